"""The benchmarks' command line: `python -m benchmarks kernels`, `step`, `compile` and others."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

# The commands import what they need themselves: `--help` need not wait for JAX, nor JAX for torch.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Time jax-lora against what bounds it, against XLA, and against vLLM and SGLang.",
    epilog="Errors of the input end with status 2.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


Unrolled = Annotated[
    bool, typer.Option("--unrolled", help="Layers one by one, not stacked and run by a scan.")
]


def progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Mistakes in what the user gave: the message alone, and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


Plot = Annotated[Path | None, typer.Option(help="Draw the report into this image file.")]


@app.command()
def kernels(
    peers: Annotated[
        Path | None,
        typer.Option(help="Folder that benchmarks/peers/fetch.sh made: time vLLM and SGLang too."),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            help="`grid`: 120 sizes between decode and prefill, uneven, shuffled and mixed, or "
            "`grid:200`: 200 of them. `sweep`: T from 1 to 8192. `between`: 256 to 2048 tokens. "
            "`large`: ranks 256 and 512, and 8192 tokens. Or a JSON file with a list of cases, as "
            '[{"T": 64, "D": 8, "r": 16}]. Default: 35 cases.'
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="What `grid` draws its cases by; default: 0.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="K/N", help="Time one part of the cases alone; `join` puts them together."
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            max=32,
            help="So many processes share the GPU: they compile and check their cases together and "
            "time them in turns. A host of 16 cores may take 6.",
        ),
    ] = 1,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the report into this JSON file, after each case anew."),
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time the kernels against their floor, against XLA and against vLLM and SGLang.

    Microseconds per `y += (x A^T) B^T` in bfloat16, inside one jitted loop over weight sets that
    together exceed the L2 cache. T tokens use D adapters of rank r. Each result is checked before
    it is timed. Where tokamax is installed, its `ragged_dot` is timed too.

    The floor is what moving each byte once, or multiplying, takes at least. A case may take
    1.05 x floor and 3 us up to 256 tokens, and 1.08 x floor and 5 us beyond. Shuffled tokens may
    take 1.3 times as long as the same in runs, and twice as long beyond 1024 tokens. No case may
    take longer than the best peer or XLA, nor longer than one with twice the tokens. The end of
    the table tells which cases miss which target. Exits with 1 where a case gave a wrong result.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import kernels as benchmark
        from benchmarks import pictures, tables
        from benchmarks.cases import cases_of, name_of, part_of
        from benchmarks.workers import run_in_processes

        chosen = cases_of(cases, seed)
        chosen = chosen if part is None else part_of(chosen, part)
        if plot is not None:
            pictures.check_path(plot)
        if save is not None and not save.parent.is_dir():
            raise ValueError(f"save {str(save)!r:.99}: there is no such folder")
        name = name_of(cases)
        if processes > 1:
            report = run_in_processes(chosen, peers, progress, processes, name=name, save=save)
        else:
            report = benchmark.run(chosen, peers, progress, name=name, save=save)
        if plot is not None:
            pictures.draw(report, plot)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_kernels(report)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def join(
    reports: Annotated[list[Path], typer.Argument(help="Files that `kernels --save` wrote.")],
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Print saved reports of `kernels` as one, with the verdicts of all their cases."""
    with input_errors():
        from benchmarks import pictures, tables
        from benchmarks.report import Report
        from benchmarks.report import join as joined

        report = joined([Report.load(path) for path in reports])
        if plot is not None:
            pictures.draw(report, plot)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_kernels(report)


@app.command()
def step(
    layers: Annotated[int | None, typer.Option(min=1, help="Default: 32.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a decode step; default: 64.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each row; default: 1024.")] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Tokens of the prefill, in 8 prompts; default: 4096.")
    ] = None,
    unrolled: Unrolled = False,
    profile: Annotated[bool, typer.Option("--profile", help="List each step's kernels.")] = False,
    as_json: Json = False,
) -> None:
    """Time whole decode and prefill steps of a model shaped like Llama-3-8B.

    Random bfloat16 weights, LoRA on all seven projections. Each row is one compiled program in
    steady state: without LoRA; with LoRA, but no adapter in the batch; with 8 adapters, one per row
    and mixed ranks. Then single calls: mixed ranks beside one bucket of the same bytes, buckets
    without a token, projections of one input. Beside each stands its target, and whether that is
    met. Without a GPU a small model runs, and no target is held against it.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import step as benchmark
        from benchmarks import tables

        numbers = layers, batch, context, prefill
        shape = benchmark.Shape.of_this_machine(*numbers, scan=not unrolled)
        report = benchmark.run(shape, progress, profile=profile)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_step(report)


Layers = Annotated[int | None, typer.Option(min=1, help="Layers of the model; default: 32.")]


@app.command()
def forms(
    layers: Layers = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a decode step; default: 64.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each row; default: 1024.")] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Tokens of the prefill, in 8 prompts; default: 4096.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all steps are timed.")] = 3,
    as_json: Json = False,
) -> None:
    """Time the steps of a scanned model beside those of its layers one by one.

    Shapes and cases are those of `step`. All programs are in one process and are timed in turn; a
    row tells the medians. By `jax.lax.scan` the same model runs in JAX's own loop, which slices
    each layer's adapters out of those of all layers. A scanned step may take 3 % longer.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import forms as benchmark
        from benchmarks import step, tables

        shape = step.Shape.of_this_machine(layers, batch, context, prefill)
        report = benchmark.run(shape, progress, rounds=rounds)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_forms(report)


@app.command()
def serve(
    layers: Layers = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each workload.")] = 500,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at a time, of S-LoRA's.")] = 64,
    adapters: Annotated[
        str, typer.Option(help="Numbers of adapters, of S-LoRA's workloads.")
    ] = "5,100,1000,2000",
    slots: Annotated[
        int,
        typer.Option(min=1, help="In each rank bucket; 64 of 8, 16, 32 and 64 each take 40 GB."),
    ] = 64,
    only: Annotated[
        str, typer.Option(help="Workloads whose name has this: `Punica`, `rank 8`, ...")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="What traces and prompts are drawn by.")] = 0,
    as_json: Json = False,
) -> None:
    """Serve the workloads of Punica and S-LoRA by the engine, in a closed loop.

    A model shaped like Llama-3-8B with random bfloat16 weights, LoRA on all seven projections, an
    engine of 64 rows. Names of adapters stand for 50 distinct ones on the host, or fewer names for
    themselves; each load is uploaded. Each workload stands beside the base model's in the same
    lengths. With 2,000 names the engine should give at least 95 % of the tokens per second that it
    gives with 5.

    Then one request at a time: how much later its first token comes if its adapter is on the host
    and in no slot. At most 30 ms should it be for ranks 8 and 16, and 60 for 64. Without a GPU a
    small model runs, and no aim is held against it.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import serve as benchmark
        from benchmarks import tables

        counts = [int(count) for count in adapters.split(",")]
        options = benchmark.Options(layers, requests, slots, seed, benchmark.steps_here())
        report = benchmark.run(benchmark.workloads(in_flight, counts, only), options, progress)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_serve(report)


@app.command()
def http(
    layers: Layers = None,
    requests: Annotated[int, typer.Option(min=8, help="Requests of each turn.")] = 384,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 2,
    as_json: Json = False,
) -> None:
    """Say what HTTP costs: the engine's tokens per second beside those through the server.

    A model shaped like Llama-3-8B with random bfloat16 weights, 8 adapters of rank 16, 64 streams
    in a closed loop with S-LoRA's lengths. The client is another process on this machine. The aim
    is to lose at most 5 %. Without a GPU a small model runs with 8 streams, whose steps are too
    short for the aim.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import endpoint, tables

        report = endpoint.run(layers, requests, turns, progress)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_http(report)


@app.command()
def engine(
    layers: Layers = None,
    only: Annotated[
        str, typer.Option(help="Rows whose name has one of these, behind that without LoRA.")
    ] = "",
    profile: Annotated[
        bool, typer.Option("--profile", help="Also trace 500 steps of a whole engine, and 20.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the engine's decode steps: 64 rows of a model shaped like Llama-3-8B, 1,024 tokens each.

    Sampling and blocks of keys and values included. Without LoRA; the same with blocks that XLA
    gathers, where else a kernel reads them; beside chunks of prompts. Then with 8 adapters of rank
    16, 8 of ranks 8 to 128, and one of rank 16 for each row. Beside each stands its target. Without
    a GPU a small model runs, and no target is held against it.

    `--profile` has an engine decode 64 requests of 8 adapters of rank 16, half of them drawn with
    top-p, with stop texts: the GPU should idle at most 2 % of 500 steps. What 20 more launch is
    told too.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import engine_steps, idle, tables
        from benchmarks.step import Shape

        report = engine_steps.run(Shape.of_this_machine(layers), progress, only)
        found = idle.run(layers, progress) if profile else None
    if as_json:
        print_json(report.to_dict() | ({"profile": dataclasses.asdict(found)} if found else {}))
        return
    tables.print_step(report)
    if found:
        tables.print_idle(found)


@app.command()
def soak(
    layers: Annotated[
        int, typer.Option(min=1, help="Layers of the model. 32 take 50 GB of disk, for adapters.")
    ] = 2,
    requests: Annotated[int, typer.Option(min=2, help="Requests.")] = 2000,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="What all is drawn by.")] = 0,
    as_json: Json = False,
) -> None:
    """Put a long mixed load on the engine, and ask each request once more alone.

    Adapters of ranks 1 to 256 share 16 slots; 5 % of them are broken in different ways. Requests
    have random lengths, some are cancelled, and adapters are replaced throughout. Each sound
    request must have the bits that it has alone, nothing may compile, and all must have ended. At
    the end the devices may hold 1 % more than halfway, and the process 5 %. Exits with 1 where that
    is not so.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import soak as endurance
        from benchmarks import tables

        load = endurance.Load(adapters=adapters, requests=requests, seed=seed)
        summary = endurance.run(load, progress, layers=layers)
    if as_json:
        print_json(dataclasses.asdict(summary))
    else:
        tables.print_soak(summary)
    if not summary.ok:
        raise typer.Exit(1)


@app.command()
def chaos(
    seconds: Annotated[float, typer.Option(min=1, help="Of the mixed part.")] = 60,
    connections: Annotated[int, typer.Option(min=1, help="Of a flood.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="What all is drawn by.")] = 0,
    as_json: Json = False,
) -> None:
    """Be a thousand rude clients of `jax-lora serve`, and check each answer.

    Floods; slow readers; half-closed connections; requests and answers that are left in the
    middle; garbage; an adapter that is loaded, replaced and unloaded throughout; at last SIGKILL,
    and a new start. Each answer must be the one that its adapter gives alone, or an error, and
    memory must stay flat. Exits with 1 where that is not so.
    """
    with input_errors():
        from benchmarks import chaos as endurance
        from benchmarks import tables

        load = endurance.Load(seconds=seconds, connections=connections, seed=seed)
        summary = endurance.run(load, progress)
    if as_json:
        print_json(dataclasses.asdict(summary))
    else:
        tables.print_chaos(summary)
    if not summary.ok:
        raise typer.Exit(1)


@app.command()
def train(
    layers: Annotated[int | None, typer.Option(min=1, help="Default: 32.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step, in 8 rows; default: 8192.")
    ] = None,
    ways: Annotated[
        str, typer.Option(help="What to time: some of frozen, adapters, mixed, exact, ragged, one.")
    ] = "frozen,adapters,mixed,ragged,one",
    publish: Annotated[bool, typer.Option(help="Time the copy of an adapter too.")] = True,
    profile: Annotated[bool, typer.Option("--profile", help="List each step's kernels.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the report into a JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Time a training step of a model shaped like Llama-3-8B.

    Random frozen bfloat16 weights, layers made again when going back, fused attention, LoRA on all
    seven projections, one AdamW update. Beside it stand the forward and backward of the frozen
    model (which differentiates the embedding's output), mixed ranks, a sort and two `ragged_dot`
    for each projection, and one adapter in plain `jax.numpy`. "more" is memory beyond the frozen
    step's, the adapters and the optimizer's state. Without a GPU a small model runs, and no target
    is held against it.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import tables
        from benchmarks import train as benchmark

        shape = benchmark.Shape.of_this_machine(layers, tokens)
        report = benchmark.run(shape, ways.split(","), progress, publish=publish, profile=profile)
        if save is not None:
            save.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_train(report)


@app.command()
def mesh(
    gpus: Annotated[
        int | None, typer.Option(help="World sizes 1, 2, 4 and so on up to it; default: all.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as one GPU holds.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a decode step; default: 64.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each row; default: 1024.")] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Tokens of the prefill, in 8 prompts; default: 4096.")
    ] = None,
    phases: Annotated[
        str, typer.Option(help="What to time, in this order: decode, prefill, training.")
    ] = "decode,prefill,training",
    fully_sharded: Annotated[
        bool, typer.Option("--fully-sharded", help="Divide the adapters' ranks too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time steps of a stack of Llama-3-70B's layers, tensor-parallel on 1, 2, 4 and more GPUs.

    Random bfloat16 weights, LoRA on all seven projections: without LoRA, with 8 adapters of rank
    16, with mixed ranks. Each row tells what LoRA adds, what the collectives take, and how far the
    logits are from one GPU's. A training step is that of `python -m benchmarks train`. Without a
    GPU a small model runs on the CPU's devices, of which JAX_NUM_CPU_DEVICES says how many there
    are. NCCL's sums by NVLink multicast are off, unless NCCL_NVLS_ENABLE is set.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with input_errors():
        progress("starting JAX")
        from benchmarks import mesh as benchmark
        from benchmarks import tables

        shape = benchmark.shape_of_this_machine(layers, batch, context, prefill)
        sizes = benchmark.world_sizes(gpus)
        names = phases.split(",")
        report = benchmark.run(shape, sizes, progress, fully_sharded=fully_sharded, phases=names)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_mesh(report)


@app.command("compile")
def compile_steps(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 30,
    unrolled: Unrolled = False,
    for_h200: Annotated[
        bool,
        typer.Option(
            "--for-h200", help="Compile for an H200 that is not there, by JAX's CUDA plugin."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time how long the steps of a model shaped like SmolLM2-135M take to compile.

    LoRA on all projections, in four rank buckets. Below the times stand the arrays as large as a
    layer's own that each turn of the scan makes: copies that it should do without.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import compiling, targets

        device = targets.h200() if for_h200 else None
        rows = compiling.run(layers, progress, scan=not unrolled, device=device)
    if as_json:
        print_json({"rows": [dataclasses.asdict(row) for row in rows]})
        return
    for row in rows:
        print(f"{row.name:8} {row.wall_s:6.1f} s, of the CPU {row.cpu_s:6.1f} s")
        for what, made in (("stacks", row.stacks), ("weights, cache", row.weights)):
            print(f"    copies of {what} in the loop: {', '.join(made) or 'none'}")


@app.command()
def gradients(
    cases: Annotated[
        str | None,
        typer.Option(
            help='JSON file with a list of cases, e.g. [{"T": 64, "D": 8, "r": 16}]; `first` '
            "for the most telling ones; or `sample:40` for 40 drawn from all sizes."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="What `sample` draws its cases by.")] = 0,
    ways: Annotated[
        str,
        typer.Option(
            help="What to time: some of ours, compact (where slots are free), xla, ragged, dense."
        ),
    ] = "ours,dense,ragged,xla",
    seconds: Annotated[float, typer.Option(help="Start no case after so many seconds.")] = 3600,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that prepare cases together.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Add each result to this JSON-lines file.")] = Path(
        "gradients.jsonl"
    ),
) -> None:
    """Time forward and backward of `y + lora(x)`, with gradients for x, A and B.

    Microseconds in bfloat16, inside one jitted loop. Beside ours stand XLA's form, `ragged_dot`
    over sorted tokens, and one dense adapter in plain `jax.numpy`. The floor is what moving each
    byte once takes. The aim is 1.5 x floor + 20 us, twice the floor for shuffled tokens.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import gradients as benchmark

        chosen = tuple(ways.split(","))
        if unknown := set(chosen) - {"ours", "compact", "xla", "ragged", "dense"}:
            known = "ours, compact, xla, ragged and dense"
            raise ValueError(f"--ways takes {known}, got {sorted(unknown)}")
        named = benchmark.cases_of(cases, seed)
        if processes > 1:
            benchmark.run_in_processes(named, chosen, seconds, out, processes)
        else:
            benchmark.run(named, chosen, seconds, out)


@app.command()
def agreement(
    dtypes: Annotated[
        str, typer.Option(help="Types of weights and computation.")
    ] = "float32,bfloat16",
    plot: Plot = None,
) -> None:
    """Say how far the trainer's log-probabilities are from the sampler's, and those of steps.

    The bundled model samples with each of its adapters and without, a token at a time. Then one
    forward over the whole sequences, as a training step runs it, reads the same tokens. Tokens of
    rows without an adapter tell what the base model's own rounding gives.

    Then the engine reads and answers requests in steps of three sizes: rows, chunks of prompts,
    blocks. Given tokens must have the same log-probabilities but for rounding, and the share of
    requests is told whose greedy answers are not the same.
    """
    with input_errors():
        progress("starting JAX")
        from benchmarks import agreement as benchmark
        from benchmarks import chunkings
        from benchmarks.pictures import check_path

        if plot is not None:
            check_path(plot)
        if unknown := {*dtypes.split(",")} - {"float32", "bfloat16", "float16"}:
            raise ValueError(f"--dtypes takes float32, bfloat16 and float16, got {sorted(unknown)}")
        found = [benchmark.run(dtype, progress) for dtype in dtypes.split(",")]
        spreads = [chunkings.run(dtype, progress) for dtype in dtypes.split(",")]
        if plot is not None:
            benchmark.draw(found, plot)
    for one in found:
        print(one.line)
    for spread in spreads:
        print(spread.line)
    print(f"deltas of both phases: {benchmark.delta_ulps():.2f} bfloat16 ulp apart, at most")


@app.command()
def bits(
    before: Annotated[Path, typer.Option(help="Folder of another checkout of jax-lora.")],
) -> None:
    """Say which cases have other bits than another checkout gives them, on this GPU.

    For a refactoring of the kernels: no case may differ. Exits with 1 where one does.
    """
    from benchmarks import bits as comparison

    with input_errors():
        differ = comparison.compare(before)
    if differ:
        raise typer.Exit(1)


@app.command()
def torch(as_json: Json = False) -> None:
    """Time LoRAX's ops on PyTorch tensors: what a call costs the host and the GPU, by each path.

    64 tokens use 8 adapters of rank 16. "native" launches the kernels on torch's stream, "dlpack"
    goes through JAX's runtime, "public" is what a caller without this package would write. All of
    them and torch's own addition take turns for ten seconds, because a host changes its speed. The
    table shows the best time and the median.
    """
    with input_errors():
        if importlib.util.find_spec("torch") is None:
            raise ValueError("this benchmark needs PyTorch: pip install torch")
        from benchmarks import tables, torch_calls

        report = torch_calls.run()
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        tables.print_torch(report)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
