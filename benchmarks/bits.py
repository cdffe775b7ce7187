"""Whether two checkouts compute the same bits, on the device that is here.

    python -m benchmarks bits --before ../checkout-of-the-commit-before

Each checkout runs in a process of its own and prints a digest for each case: the ops of one stack
over ranks, dtypes and token counts, and models with LoRA layers, decode and prefill, packed and
not. Only names that both checkouts have are used, so the script outlives changes of the ops below.
"""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_lora
import pallas_kernels as pk

RANKS = (8, 16, 64, 128, 256)
TOKENS = (7, 64, 300, 4096)
DTYPES = ("bfloat16", "float16")


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(dtype)


def _digest(*arrays: jax.Array) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.asarray(array).tobytes())
    return found.hexdigest()[:16]


def _ids(rng: np.random.Generator, tokens: int, adapters: int, *, runs: bool) -> np.ndarray:
    ids = rng.integers(-1, adapters, tokens).astype(np.int32)
    return np.sort(ids) if runs else ids


def op_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """The halves and `add_lora`, of one stack."""
    for tokens, rank, dtype in itertools.product(TOKENS, RANKS, DTYPES):
        if dtype == "float16" and rank != 16:
            continue
        for x_dtype in (dtype, "float32") if rank == 128 else (dtype,):
            name = f"T{tokens} r{rank} {dtype} x {x_dtype}"
            yield name, functools.partial(_op_digest, tokens, rank, dtype, x_dtype)


def _op_digest(tokens: int, rank: int, dtype: str, x_dtype: str) -> str:
    rng = np.random.default_rng([tokens, rank])
    adapters, features, width = 9, 1024, 768
    x, y = _normal(rng, (tokens, features), x_dtype), _normal(rng, (tokens, width), dtype)
    a = _normal(rng, (adapters, rank, features), dtype)
    b = _normal(rng, (adapters, width, rank), dtype)
    scales = jnp.asarray(rng.uniform(0.5, 2, adapters), jnp.float32)
    ids = _ids(rng, tokens, adapters, runs=tokens > 256)

    @jax.jit
    def run(y, x, a, b, scales, ids):  # type: ignore[no-untyped-def]
        segments = pk.make_segments(ids, adapters)
        phase = "prefill" if tokens > 256 else "decode"
        add = functools.partial(pk.add_lora, phase=phase, implementation="mosaic_gpu")
        v = pk.bgmv_shrink(x, a, ids, implementation="mosaic_gpu")
        vs = pk.sgmv_shrink(x, a, segments, implementation="mosaic_gpu")
        return (
            v,
            vs,
            pk.bgmv_expand(v, b, ids, y, implementation="mosaic_gpu"),
            pk.sgmv_expand(vs, b, segments, y, add_inputs=False, implementation="mosaic_gpu"),
            add(y, x, a, b, ids, scales=scales),
            add(y, x, a, b, segments, scales=scales),
        )

    return _digest(*run(y, x, a, b, scales, ids))


class _Net(nnx.Module):
    def __init__(self, features: int, widths: tuple[int, ...], rngs: nnx.Rngs) -> None:
        half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.layers = nnx.List(nnx.Linear(features, n, rngs=rngs, **half) for n in widths)
        for layer in self.layers:
            # A product's bits depend on what XLA's autotuning chooses; a bias has none of that.
            layer.kernel.set_value(jnp.zeros(layer.kernel.shape, jnp.bfloat16))
            bias = _normal(np.random.default_rng(0), (layer.out_features,), "bfloat16")
            layer.bias = nnx.Param(bias)


def layer_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """LoRA layers of several rank buckets, one by one and packed."""
    buckets = ((16,), (8, 16, 32, 64, 128), (48, 256))
    for tokens, some, packed in itertools.product((64, 512), buckets, (0, 1)):
        name = f"layers T{tokens} buckets {some}{' packed' if packed else ''}"
        yield name, functools.partial(_layer_digest, tokens, some, bool(packed))


def _layer_digest(tokens: int, buckets: tuple[int, ...], packed: bool) -> str:
    rng = np.random.default_rng([tokens, *buckets])
    features, widths = 1024, (1024, 256, 512)
    model = _Net(features, widths, nnx.Rngs(0))
    jax_lora.apply_lora(model, slots=2, buckets=buckets)
    bank = jax_lora.AdapterBank(model)
    names: list[str | None] = [None]
    for n, bucket in enumerate((*buckets, *buckets)):
        rank = bucket - (3 if n >= len(buckets) else 0)
        config = jax_lora.LoRAConfig(rank, 2.0 * rank)
        modules = {
            f"layers.{i}": jax_lora.LoRAWeights(
                rng.standard_normal((rank, features), np.float32) * features**-0.5,
                rng.standard_normal((width, rank), np.float32) * rank**-0.5,
                config.scale_of(f"layers.{i}"),
            )
            for i, width in enumerate(widths)
        }
        bank.load(f"adapter {n}", jax_lora.Adapter(config, modules))
        names.append(f"adapter {n}")
    ids = _ids(rng, tokens, len(names) - 1, runs=tokens > 256)
    phase = "prefill" if tokens > 256 else "decode"
    batch = bank.batch([names[i + 1] for i in ids], phase=phase)

    @nnx.jit
    def run(model, x, batch):  # type: ignore[no-untyped-def]
        with jax_lora.use(batch):
            layers = list(model.layers)
            return jax_lora.call_packed(layers, x) if packed else [f(x) for f in layers]

    return _digest(*run(model, _normal(rng, (tokens, features), "bfloat16"), batch))


def digests(nth: int) -> dict[str, str]:
    """A digest of each of the nth process's cases, by the checkout that is imported."""
    cases = itertools.chain(op_cases(), layer_cases())
    return {name: run() for name, run in itertools.islice(cases, nth, None, _PROCESSES)}


# Each checkout has as many. Lowering takes most of the time, and is Python's.
_PROCESSES = 6


def _of_process(root: Path, nth: int) -> dict[str, str]:
    code = f"import json, bits; print(json.dumps(bits.digests({nth})))"
    path = f"{root}{os.pathsep}{Path(__file__).parent}"
    env = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(before: Path) -> list[str]:
    """Runs both checkouts, and prints and returns the cases whose bits differ.

    Raises:
      FileNotFoundError: `before` holds no checkout.
    """
    if not (before / "pallas_kernels").is_dir():
        raise FileNotFoundError(f"{before} holds no checkout of jax-lora")
    roots = Path(__file__).parents[1], before.resolve()
    with ThreadPoolExecutor(2 * _PROCESSES) as threads:
        found = [
            [threads.submit(_of_process, root, nth) for nth in range(_PROCESSES)] for root in roots
        ]
        here, there = ({k: v for job in jobs for k, v in job.result().items()} for jobs in found)
    differ = [name for name in here if here[name] != there.get(name)]
    print(f"{len(here) - len(differ)} of {len(here)} cases have the same bits")
    for name in differ:
        print(f"differs: {name}")
    return differ
