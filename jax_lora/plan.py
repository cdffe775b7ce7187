"""Which buckets and slots a folder of adapters needs, within a budget of memory."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from flax import nnx

from jax_lora.adapters import Adapter, AdapterHeader, peft_header
from jax_lora.adapters.types import EXPERT, OUTPUT_LAYERS, SharedHalf
from jax_lora.messages import shown
from jax_lora.nn.einsum import own_einsum
from jax_lora.nn.embed import TiedHead
from jax_lora.nn.experts import Experts
from jax_lora.nn.names import path_name
from jax_lora.nn.stacks import stack_dtype
from pallas_kernels.ranks import rank_bucket
from pallas_kernels.stacks import is_eight_bits

_SCALE_BYTES = 4  # of each rank column in 8 bits
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # of a layer or an expert


class Plan(TypedDict):
    """Keyword arguments of `apply_lora`."""

    buckets: tuple[int, ...]
    slots: dict[int, int]
    target: tuple[str, ...]
    dtype: Any
    full_slots: NotRequired[dict[str, int]]
    experts_share: NotRequired[dict[str, SharedHalf]]


def plan_slots(
    adapters: str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Adapter],
    memory: int,
    *,
    dtype: Any = None,
    allow_links: bool = False,
) -> Plan:
    """Proposes buckets and slots for `apply_lora`, so that its stacks fit into `memory`.

    Example::

        apply_lora(model, **plan_slots("adapters/", memory=2 << 30))

    One slot for each adapter where that fits; else each bucket holds about the same share of its
    adapters, at least one slot, and the others take turns. Where not even that fits, the smallest
    buckets are given up, and their adapters run in the next larger one. A slot takes
    `bucket * (H + N)` elements in each module that any of the adapters adapts, and in each expert
    up to the last of these. Before that, modules that adapters have whole (`modules_to_save`) get
    one full slot each, and more from what is left. Only configs and headers of files are read, no
    weights and no model: where adapters leave out some of the layers that a model has stacked for a
    scan, its stacks take more than is counted here.

    Args:
      adapters: a folder of PEFT adapters, one PEFT adapter, or several of them or of `Adapter`s.
      memory: bytes that stacks and full slots may take.
      dtype: dtype of the stacks; None for the adapters' own (float32 where they differ). With 8
        bits, what embeddings and full slots take is counted in the adapters' own.
      allow_links: see `load_peft`.

    Returns:
      `apply_lora`'s `buckets`, `slots`, `target` (the modules that the adapters name, so that no
      other layer gets stacks) and `dtype`; `full_slots` too, if an adapter needs some, and
      `experts_share`, if the experts of all adapters share a half, as their files say. All
      expressions match the files' names. A model whose `peft_names` rename more than single layers
      needs its own: `plan | {"target": ..., "experts_share": ...}`, and likewise `full_slots`.

    Raises:
      TypeError: an argument of another type.
      ValueError: there are no adapters, they disagree about a module's shape, or one slot for the
        largest of them, and full slots, take more than `memory`; see also `load_peft`.
      FileNotFoundError: see `load_peft`.
    """
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory must be an int, in bytes, got {shown(memory)}")
    headers = _headers(adapters, allow_links)
    shapes = _shapes(headers)
    dtypes = {header.dtype for header in headers}
    own = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    dtype = stack_dtype(dtype or own, eight_bits=True)
    shared = _experts_share(headers)
    bytes_per_rank = _bytes_per_rank(headers, shapes, dtype, own)
    bytes_per_rank -= dtype.itemsize * _repeated(shapes, shared)
    full, given = _full(headers, own if is_eight_bits(dtype) else dtype), memory
    memory -= sum(full.values())
    wanted = Counter(rank_bucket(header.rank) for header in headers)
    while sum(wanted) * bytes_per_rank > memory and len(wanted) > 1:
        smallest, larger = sorted(wanted)[:2]
        wanted[larger] += wanted.pop(smallest)
    if sum(wanted) * bytes_per_rank > memory:
        (bucket,) = wanted
        raise ValueError(
            f"memory={given} bytes hold no slot: one of bucket {bucket} takes "
            f"{bucket * bytes_per_rank}, {dtype} in {len(shapes)} modules"
            f"{f', and full slots {sum(full.values())}' if full else ''}. Give more, a smaller "
            f"dtype=, or leave out the adapters of rank {max(h.rank for h in headers)}"
        )
    nbytes = {bucket: bucket * bytes_per_rank for bucket in wanted}
    slots, left = _filled(nbytes, wanted, memory - sum(nbytes.values()))
    target = tuple(dict.fromkeys(_targets(module) for module in sorted(shapes)))
    plan: Plan = {"buckets": tuple(slots), "slots": slots, "target": target, "dtype": dtype}
    if shared:
        plan["experts_share"] = shared
    if full:
        counts, _ = _filled(full, Counter(m for header in headers for m in header.full), left)
        plan["full_slots"] = {re.escape(module): count for module, count in counts.items()}
    return plan


def _targets(module: str) -> str:
    """An expression for the module; for that of an expert, one for all experts of the layer, which
    stand in one layer of the model."""
    if (match := EXPERT.fullmatch(module)) is None:
        return re.escape(module)
    return rf"{re.escape(match[1])}\.\d+\.{re.escape(match[3])}"


def _shapes(headers: list[AdapterHeader]) -> dict[str, tuple[int, int]]:
    """H and N of each module that the adapters adapt or have whole."""
    shapes: dict[str, tuple[int, int]] = {}
    for header in headers:
        each = {m: (lora.in_features, lora.out_features) for m, lora in header.modules.items()}
        for module, full in header.full.items():  # of an embedding, H and N are the other way
            outputs, inputs = full.shape
            known = shapes.get(module)
            each[module] = known if known in (full.shape, full.shape[::-1]) else (inputs, outputs)
        for module, shape in each.items():
            if shapes.setdefault(module, shape) != shape:
                raise ValueError(
                    f"adapters disagree about {module}: {shapes[module]} and {shape} features; "
                    "they belong to different models"
                )
    return _with_all_experts(shapes)


def _with_all_experts(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The modules, and those of experts that no adapter adapts: a layer has stacks for all."""
    experts = {module: match for module in shapes if (match := EXPERT.fullmatch(module))}
    count = max((int(match[2]) + 1 for match in experts.values()), default=0)
    others = {
        f"{match[1]}.{number}.{match[3]}": shapes[module]
        for module, match in experts.items()
        for number in range(count)
    }
    return others | shapes


def _experts_share(headers: list[AdapterHeader]) -> dict[str, SharedHalf]:
    """The half that the experts of all adapters share, by the target of each layer with one.

    In all layers alike: a model may have these stacked for a scan.
    """
    found: dict[str, set[SharedHalf | None]] = {}
    for header in headers:
        for module in filter(EXPERT.fullmatch, header.modules):
            found.setdefault(_NUMBER.sub("", module), set()).add(header.shared.get(module))
    return {
        _targets(module): half
        for header in headers
        for module, half in header.shared.items()
        if found[_NUMBER.sub("", module)] == {half}
    }


def _repeated(shapes: Mapping[str, tuple[int, int]], shared: Mapping[str, SharedHalf]) -> int:
    """The features of what experts share, counted for all but one of each layer."""
    layers: dict[str, list[int]] = {}
    for module, (features, width) in shapes.items():
        if half := shared.get(target := _targets(module)):
            layers.setdefault(target, []).append(features if half == "A" else width)
    return sum(sum(sizes[1:]) for sizes in layers.values())


def _bytes_per_rank(
    headers: list[AdapterHeader],
    shapes: Mapping[str, tuple[int, int]],
    dtype: np.dtype[Any],
    own: np.dtype[Any],
) -> int:
    """What a slot takes for each rank of its bucket; `own`: the dtype of what is not in 8 bits."""
    if not is_eight_bits(dtype):
        return dtype.itemsize * sum(h + n for h, n in shapes.values())
    adapted = {m: lora.is_embedding for header in headers for m, lora in header.modules.items()}
    whole = {module for header in headers for module in header.full}

    def may_be_embedding(module: str) -> bool:
        is_whole = module in whole and module.rpartition(".")[2] not in OUTPUT_LAYERS
        return adapted.get(module, is_whole)

    return sum(
        own.itemsize * (h + n) if may_be_embedding(module) else h + n + _SCALE_BYTES
        for module, (h, n) in shapes.items()
    )


def _full(headers: list[AdapterHeader], dtype: Any) -> dict[str, int]:
    """The bytes of one full slot of each module that an adapter has whole."""
    found = {}
    for header in headers:
        for module, full in header.full.items():
            size = math.prod(full.shape) + (full.shape[0] if full.has_bias else 0)
            found[module] = size * dtype.itemsize
    return found


def _filled[K: (int, str)](
    nbytes: Mapping[K, int], wanted: Mapping[K, int], left: int
) -> tuple[dict[K, int], int]:
    """One slot of each kind, and more while `left` bytes hold them; and what is left then."""
    slots = dict.fromkeys(sorted(nbytes), 1)
    while growing := [
        (count / wanted[kind], kind)
        for kind, count in slots.items()
        if count < wanted[kind] and nbytes[kind] <= left
    ]:
        _, kind = min(growing)
        slots[kind] += 1
        left -= nbytes[kind]
    return slots, left


def _headers(adapters: Any, allow_links: bool) -> list[AdapterHeader]:
    if isinstance(adapters, str | os.PathLike):
        folder = Path(adapters)
        # A hidden one is what a save has not finished.
        inside = sorted(file.parent for file in folder.glob("[!.]*/adapter_config.json"))
        adapters = inside or [folder]
    elif isinstance(adapters, Adapter) or not isinstance(adapters, Iterable):
        raise TypeError(
            f"adapters must be a folder, or a list of folders and Adapters, got {shown(adapters)}"
        )
    headers = [
        a.header if isinstance(a, Adapter) else peft_header(a, allow_links=allow_links)
        for a in adapters
    ]
    if not headers:
        raise ValueError("there are no adapters to plan for")
    return headers


class Room(TypedDict, total=False):
    """Keyword arguments of `apply_lora`, beside slots and buckets."""

    target: tuple[str, ...]
    full_slots: dict[str, int]


def room_for(model: nnx.Module, headers: Iterable[AdapterHeader]) -> Room:
    """What `apply_lora` must be told, so that the model has room for these adapters at once.

    Nothing, unless one of them adapts an embedding or a tied output layer, has whole weights, or
    trained tokens. Layers that the model lacks are left out, for the bank to name them.
    """
    names: Mapping[str, object] = getattr(model, "peft_names", {})
    known: dict[str, nnx.Module] = {}
    linear: list[str] = []
    for path, module in nnx.iter_modules(model):
        name = path_name(path)
        known[str(names.get(name, name))] = module
        is_linear = isinstance(module, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | Experts)
        if is_linear or own_einsum(module):
            linear.append(name)
    whole: Counter[str] = Counter()
    tied: set[str] = set()
    for header in headers:
        tied |= {m for m in header.modules if isinstance(known.get(m), nnx.Embed | TiedHead)}
        own = {*header.full, *header.tokens}
        for name in own:
            head = getattr(known.get(name), "head", None) if name in header.tokens else None
            heads = {other for other, layer in known.items() if layer is head}
            whole.update(m for m in (name, *(heads - own)) if m in known)
    room: Room = {}
    if tied:
        room["target"] = tuple(map(re.escape, (*linear, *sorted(tied))))
    if whole:
        room["full_slots"] = {re.escape(module): count for module, count in whole.items()}
    return room
