"""What an adapter holds, which kernels run it, and what would make it faster."""

import collections
import dataclasses
import os
from pathlib import Path
from typing import Any

from jax_lora.adapters import AdapterHeader, peft_header, peft_modules
from jax_lora.adapters.types import EXPERT, SharedHalf
from jax_lora.messages import printable
from pallas_kernels.ranks import (
    BGMV_MAX_RANK,
    padded_rank,
    rank_bucket,
    rank_tier,
    select_kernel,
)

# LoRAX, server/lorax_server/utils/graph.py: LORAX_COMPILE_MAX_RANK.
LORAX_GRAPH_MAX_RANK = 64
# LoRAX, server/punica_kernels: the ranks that its CUDA kernels are compiled for.
LORAX_COMPILED_RANKS = (8, 16, 32, 64, 128)
FAST_RANKS = (16, 32, 64)

MAX_FOLDERS = 100_000
# What an adapter's folder has, of PEFT or of another project.
ADAPTER_FILES = frozenset({
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
    "adapters.safetensors", "adapters.npz", "pytorch_lora_weights.safetensors",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """One module of an adapter. `padding` is the zero share of its bucket, `nbytes` as stored; what
    experts, or an expert's gate and up, share in the file, each of them has.

    The kernels of an embedding are those of B: A is read by token.
    """

    name: str
    kind: str
    rank: int
    scale: float
    tier: str
    bucket: int
    decode_kernel: str
    prefill_kernel: str
    padding: float
    nbytes: int
    is_embedding: bool


@dataclasses.dataclass(frozen=True)
class FullReport:
    """A module that an adapter has whole, or some tokens of, so that it takes a full slot there.

    The shape is that of the weight, or of the tokens' rows.
    """

    name: str
    is_tokens: bool
    shape: tuple[int, ...]
    has_bias: bool
    nbytes: int


@dataclasses.dataclass(frozen=True)
class EightBitsReport:
    """How far stacks in a dtype of 8 bits are from an adapter; see `AdapterBank.load`.

    Attributes:
      errors: of each module but embeddings, which 8 bits are not for.
      largest: of all, in `module`; 0 and None if there are embeddings alone.
      is_taken: whether a bank takes it so.
    """

    errors: dict[str, float]
    largest: float
    module: str | None
    is_taken: bool


@dataclasses.dataclass(frozen=True)
class AdapterReport:
    """What `jax-lora inspect` tells of one adapter."""

    path: Path
    rank: int
    dtype: str
    nbytes: int
    modules: list[ModuleReport]
    lorax: list[str]
    advice: list[str]
    full: list[FullReport]
    mesh: list[str]
    eight_bits: dict[str, EightBitsReport] | None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def groups(self) -> list[tuple[int, ModuleReport]]:
        """Modules that differ in nothing but their layer, counted."""
        same = collections.Counter(dataclasses.replace(m, name=m.kind) for m in self.modules)
        return [(count, module) for module, count in same.items()]


def inspect_adapter(
    path: Path, *, allow_links: bool = False, devices: int = 1, eight_bits: bool = False
) -> AdapterReport:
    """Reports on a PEFT folder; reads its config and the header of its weights.

    All modules live in the bucket of the adapter's largest rank, out of the default buckets.

    Args:
      devices: over which a model of Llama's projections is divided; what each holds is then told.
      eight_bits: whether to read its weights too, and tell how far stacks in 8 bits are from them,
        of each dtype.

    Raises:
      FileNotFoundError, ValueError: see `load_peft`.
    """
    header = peft_header(path, allow_links=allow_links)
    bucket = rank_bucket(header.rank)
    modules = [
        ModuleReport(
            name=name,
            kind=name.rpartition(".")[2],
            rank=lora.rank,
            scale=lora.scale,
            tier=rank_tier(lora.rank).value,
            bucket=bucket,
            decode_kernel=select_kernel(bucket, "decode"),
            prefill_kernel=select_kernel(bucket, "prefill"),
            padding=1 - lora.rank / bucket,
            nbytes=lora.nbytes,
            is_embedding=lora.is_embedding,
        )
        for name, lora in header.modules.items()
    ]
    full = [
        FullReport(name, False, whole.shape, whole.has_bias, whole.nbytes)
        for name, whole in header.full.items()
    ]
    full += [
        FullReport(name, True, tokens.shape, False, tokens.nbytes)
        for name, tokens in header.tokens.items()
    ]
    ranks = sorted({module.rank for module in modules})
    return AdapterReport(
        path, header.rank, str(header.dtype), header.nbytes, modules,
        _lorax(ranks), [*_needs(header), *_advice(ranks, bucket)], full,
        _mesh(header, devices) if devices > 1 else [],
        _eight_bits(path, allow_links) if eight_bits else None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BrokenAdapter:
    """An adapter that can't be read, and why."""

    path: Path
    error: str

    def to_dict(self) -> dict[str, str]:
        return {"path": str(self.path), "error": self.error}


def inspect_below(
    path: Path, *, allow_links: bool = False, devices: int = 1, eight_bits: bool = False
) -> list[AdapterReport | BrokenAdapter]:
    """Reports on each adapter folder at or below `path`, in order; see `inspect_adapter`.

    Links to folders and hidden folders are left out. If there is no adapter, the only report says
    so.

    Raises:
      ValueError: there are more than `MAX_FOLDERS`.
    """
    reports: list[AdapterReport | BrokenAdapter] = []
    for folder in _adapter_folders(path) or [path]:
        try:
            report = inspect_adapter(
                folder, allow_links=allow_links, devices=devices, eight_bits=eight_bits
            )
            reports.append(report)
        except (OSError, ValueError) as error:
            reports.append(BrokenAdapter(folder, str(error)))
    return reports


def _adapter_folders(path: Path) -> list[Path]:
    found = []
    for count, (folder, names, files) in enumerate(os.walk(path)):
        if count >= MAX_FOLDERS:
            raise ValueError(
                f"{printable(path)} holds more than {MAX_FOLDERS} folders; give folders nearer to "
                "the adapters"
            )
        names[:] = sorted(name for name in names if not name.startswith("."))
        if not ADAPTER_FILES.isdisjoint(files):
            found.append(Path(folder))
    return found


def _mesh(header: AdapterHeader, devices: int) -> list[str]:
    """What each device holds of a slot with the adapter, in either form."""
    from jax_lora.models.parallel import bytes_per_device  # imports JAX, which few reports need

    rank, item = header.rank, header.dtype.itemsize
    lines = []
    for form, bucket, fully in (
        ("holds", rank_bucket(rank), False),
        ("with fully_sharded", rank_bucket(rank, devices), True),
    ):
        held = sum(
            bytes_per_device(
                name.rpartition(".")[2], (m.in_features, m.out_features), bucket, item, devices,
                fully=fully,
            )
            for name, m in header.modules.items()
        )  # fmt: skip
        lines.append(f"each of {devices} devices {form} {held / 1e6:.2f} MB, in bucket {bucket}")
    return lines


def _eight_bits(path: Path, allow_links: bool) -> dict[str, EightBitsReport]:
    from jax_lora.bank.eight_bits import measured  # imports JAX, which few reports need
    from pallas_kernels.stacks import EIGHT_BITS

    modules = peft_modules(path, allow_links=allow_links)
    modules = {m: weights for m, weights in modules.items() if not weights.is_embedding}
    reports = {}
    for dtype in EIGHT_BITS:
        held = measured(modules, dict.fromkeys(modules, dtype))
        errors = dict(held.errors)
        reports[dtype.name] = EightBitsReport(errors, held.largest, held.worst, held.is_taken)
    return reports


def _lorax(ranks: list[int]) -> list[str]:
    padded, largest = sorted({padded_rank(rank) for rank in ranks}), padded_rank(ranks[-1])
    graph = "replays" if largest <= LORAX_GRAPH_MAX_RANK else "does not replay"
    lines = [
        f"{graph} decode steps with this adapter as CUDA graphs (padded rank {largest}, "
        f"LORAX_COMPILE_MAX_RANK defaults to {LORAX_GRAPH_MAX_RANK})"
    ]
    if largest > BGMV_MAX_RANK:
        lines.append(f"decodes by SGMV: {largest} is above its BGMV limit of {BGMV_MAX_RANK}")
    missing = [
        rank for rank in padded if rank <= BGMV_MAX_RANK and rank not in LORAX_COMPILED_RANKS
    ]
    if missing:
        lines.append(
            f"has no compiled kernel for padded rank {', '.join(map(str, missing))}: its CUDA "
            "dispatch raises 'No suitable kernel'"
        )
    if len(ranks) > 1:
        lines.append(f"scales modules by one rank, though theirs differ ({ranks})")
    return lines


def _needs(header: AdapterHeader) -> list[str]:
    """What a model must have for the adapter, or could save by it, beside a bucket."""
    lines = ["it uses DoRA, so give apply_lora dora=True"] if header.config.dora else []
    kinds: dict[str, set[SharedHalf | None]] = {}
    for module in filter(EXPERT.fullmatch, header.modules):
        kinds.setdefault(module.rpartition(".")[2], set()).add(header.shared.get(module))
    # An expression matches a kind in all layers, so all must share the half.
    shared = {kind: half for kind, (half, *more) in kinds.items() if half and not more}
    if shared:
        lines.append(
            "its experts share halves: by the names that your model has, give apply_lora "
            f"experts_share={shared}"
        )
    return lines


def _advice(ranks: list[int], bucket: int) -> list[str]:
    largest, lines = ranks[-1], []
    if largest > FAST_RANKS[-1]:
        lines.append(f"train with rank 64 or 32: each token pays for a bucket of {bucket}")
        lines.append("rsLoRA (use_rslora) gets more out of a rank, if that is what it was for")
    elif largest < bucket:
        lines.append(f"rank {largest} runs padded to {bucket}: train with {bucket}, at equal speed")
    if largest < FAST_RANKS[0]:
        lines.append("rank 16 is the smallest that LoRAX's custom kernels take")
    if len(ranks) > 1:
        lines.append(
            f"all modules share bucket {bucket}, for rank {largest}: the lower ranks save no time"
        )
    return lines or [f"nothing to change: rank {largest} fills its bucket"]
