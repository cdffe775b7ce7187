"""Reading and writing the folders of Hugging Face PEFT."""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jax_lora.adapters.config import (
    MERGE,
    Choice,
    dense_config,
    enabled_parts,
    read_config,
    token_indices,
)
from jax_lora.adapters.experts import apart, of_parameter, stacked
from jax_lora.adapters.files import (
    JsonObject,
    TensorFile,
    check_folder,
    open_file,
    open_safetensors,
    parse_json,
    read_bounded,
    write_safetensors,
)
from jax_lora.adapters.foreign import refuse_foreign
from jax_lora.adapters.halves import Grouped, Half
from jax_lora.adapters.names import Rename, new_names, renamed_config, unwrapped
from jax_lora.adapters.patterns import MAX_PATTERNS, MAX_WORK
from jax_lora.adapters.types import (
    OUTPUT_LAYERS,
    Adapter,
    AdapterHeader,
    FullModule,
    LoRAConfig,
    LoRAShape,
    LoRAWeights,
    TokensShape,
    TrainedTokens,
    check_full,
    check_halves,
    check_has_lora,
    check_magnitude,
    check_module,
    check_tokens,
    full_shape,
)
from jax_lora.messages import printable, shown

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 4 << 20
_CHUNK = 1 << 20  # elements that are compared at once
_WAITS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.2)  # seconds, for a save to end

# Metadata of the weights: SHA-256 of the config that was saved with them, and of the one before.
_OWN, _REPLACED = "jax_lora.config", "jax_lora.replaced_config"

_MAX_KEY = 1024
_COPY = re.compile(r"base_model\.model\.(.+)\.base_layer\.weight", re.DOTALL)
_KEY = re.compile(
    r"base_model\.model\.(.+)\.lora_(?:([AB])(?:\.([^.]+))?\.weight|embedding_([AB])(?:\.([^.]+))?)",
    re.DOTALL,
)
_MAGNITUDE = re.compile(
    r"base_model\.model\.(.+)\.lora_magnitude_vector(?:\.(?!weight$)([^.]+))?(?:\.weight)?",
    re.DOTALL,
)
_FULL = re.compile(r"base_model\.model\.(.+)\.(weight|bias)", re.DOTALL)
_TOKENS = re.compile(
    r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?", re.DOTALL
)
_EMBEDDINGS = frozenset({"embed_tokens", *OUTPUT_LAYERS})  # which PEFT saves with a LoRA unasked
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_diag": "KaSA",
    "lora_velora": "VeLoRA",
    "monteclora": "MonteCLoRA",
    "modules_to_save": "a fully trained module",
    ".score.": "a fully trained module",
    ".classifier.": "a fully trained module",
    ".qa_outputs.": "a fully trained module",
    "token_adapter": "trained tokens",
    "trainable_tokens": "trained tokens",
    "lora_E": "AdaLoRA",
    ".bias": "a bias",
    "embed_tokens": "a saved or resized embedding",
    "lm_head": "a saved or resized output layer",
}


def _inner_name(key: str) -> str:
    """The module's name below PEFT's prefix, with the wrappers that the base model had."""
    inside = key.partition("base_model.")[2].partition("model.")[2]
    return inside.rpartition(".lora_")[0]


@dataclass(frozen=True)
class _Found:
    """Where an adapter's tensors are, by the names of modules without wrappers.

    Attributes:
      halves: "A" and "B" of each module, and "magnitude" with DoRA.
      copies: the base model's own weights that PEFT saved beside a LoRA.
      full: "weight", and "bias" if there is one, of each module to save.
      tokens: of each module with trained tokens.
      wrapped: the names with wrappers, of the modules that have some.
    """

    halves: dict[str, dict[str, Half]]
    copies: dict[str, Half]
    full: dict[str, dict[str, Half]]
    tokens: dict[str, Half]
    wrapped: dict[str, str]


@dataclass(frozen=True)
class _Opened:
    """An adapter's open files: its header, and where its tensors are; see `_Found`."""

    header: AdapterHeader
    halves: Mapping[str, Mapping[str, Half]]
    copies: Mapping[str, Half]
    full: Mapping[str, Mapping[str, Half]]
    tokens: Mapping[str, Half]


def load_peft(
    path: str | os.PathLike[str],
    *,
    check: Callable[[AdapterHeader], object] | None = None,
    base_weight: Callable[[str], np.ndarray] | None = None,
    max_bytes: int | None = None,
    rename: Rename | None = None,
    allow_links: bool = False,
    allow_nonfinite: bool = False,
    max_seconds: float | None = None,
) -> Adapter:
    """Reads an adapter from the folder in which PEFT saved it.

    The weights are NumPy arrays of the file's dtype (bfloat16 as `ml_dtypes.bfloat16`), read at the
    speed of the disk. Module names are those of the base model: PEFT's prefix `base_model.model.`
    is removed, and so are the names of torch's own wrappers: `_orig_mod` (torch.compile),
    `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, and `module` (DDP) in front of the prefix.
    While `save_peft` replaces the files, this reads the old ones or the new ones.

    Args:
      path: folder with `adapter_config.json` and `adapter_model.safetensors`, or its shards.
      check: called before a tensor is read; what it raises ends the load.
      base_weight: from a module's name to the base model's weight, as PEFT stores it: `[N, H]`;
        of an embedding, `[H, N]`. PEFT saves a copy of the base's output layer or embedding beside
        a LoRA of it: a copy that equals this is left out.
      max_bytes: most bytes of weights to read; None for any number.
      rename: other names for the modules. A mapping gives prefixes, of whole parts of a name, new
        ones, and the longest that a name has counts: `{"module": ""}` removes one, `{"": "model"}`
        puts one in front, and names with none stay. A function takes and gives a whole name.
      allow_links: follow symbolic links out of the folder, such as Hugging Face's cache has.
      allow_nonfinite: accept NaN and infinite weights.
      max_seconds: for reading weights, looked at between tensors; None for any time. `UploadLimits`
        has all limits together.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is truncated or malformed, config and weights disagree or are of different
        saves, a weight is NaN or infinite, a file is a link out of the folder, or the adapter uses
        a feature of PEFT that is not supported. The message names the file, the values and the
        remedy.
    """
    folder = Path(path)
    with _open(folder, allow_links, rename) as opened:
        header = opened.header
        if check is not None:
            check(header)
        if max_bytes is not None and header.nbytes > max_bytes:
            raise ValueError(
                f"{printable(folder)} has {header.nbytes} bytes of weights; max_bytes={max_bytes}"
            )
        read = _reader(folder, max_seconds)
        for module, copy in opened.copies.items():
            _check_copy(folder, module, copy, base_weight)
        modules = _modules(folder, opened, read, allow_nonfinite)
        full = {}
        for module, stored in opened.full.items():
            tensors = {name: read(tensor) for name, tensor in stored.items()}
            _check_finite(folder, module, tensors, allow_nonfinite)
            full[module] = FullModule(tensors["weight"], tensors.get("bias"))
        tokens = {}
        for module, half in opened.tokens.items():
            rows = read(half)
            _check_finite(folder, module, {"trained tokens": rows}, allow_nonfinite)
            tokens[module] = TrainedTokens(header.tokens[module].indices, rows)
    return Adapter(header.config, modules, full, tokens)


def peft_modules(
    path: str | os.PathLike[str], *, allow_links: bool = False
) -> dict[str, LoRAWeights]:
    """The modules of what `load_peft` would read, without whole weights, trained tokens and copies
    of the base model's weights.

    Raises: as `load_peft`.
    """
    folder = Path(path)
    with _open(folder, allow_links) as opened:
        return _modules(folder, opened, _reader(folder, None), False)


def _modules(
    folder: Path, opened: _Opened, read: Callable[[Half], np.ndarray], allow_nonfinite: bool
) -> dict[str, LoRAWeights]:
    modules = {}
    for module, halves in opened.halves.items():
        tensors = {half: read(stored) for half, stored in halves.items()}
        shape, magnitude = opened.header.modules[module], tensors.get("magnitude")
        modules[module] = LoRAWeights(
            tensors["A"], tensors["B"], shape.scale, shape.is_embedding, magnitude
        )
        named = {f"lora_{half}": tensor for half, tensor in tensors.items()}
        _check_finite(folder, module, named, allow_nonfinite)
    return modules


def _reader(folder: Path, max_seconds: float | None) -> Callable[[Half], np.ndarray]:
    """Reads tensors; ValueError once it is `max_seconds` old."""
    start = time.monotonic()

    def read(stored: Half) -> np.ndarray:
        took = time.monotonic() - start
        if max_seconds is not None and took > max_seconds:
            raise ValueError(
                f"{printable(folder)}: its weights were not read in {took:.1f} s; "
                f"max_seconds={max_seconds:g}"
            )
        return stored.read()

    return read


def _check_finite(
    folder: Path, module: str, tensors: Mapping[str, np.ndarray], allow_nonfinite: bool
) -> None:
    for name, tensor in tensors.items():
        if not (allow_nonfinite or _is_finite(tensor)):
            raise ValueError(
                f"{printable(folder)}: {module} has NaN or infinite weights in {name}, which "
                "spread through all that it computes; train again, or give allow_nonfinite=True"
            )


def peft_header(
    path: str | os.PathLike[str], *, allow_links: bool = False, rename: Rename | None = None
) -> AdapterHeader:
    """What `load_peft` would read from the folder, without its tensors.

    Raises: as `load_peft`.
    """
    with _open(Path(path), allow_links, rename) as opened:
        return opened.header


# The exponent's bits of a half, which are all set in NaN and infinity. NumPy is faster with words
# than with halves, so that a load keeps up with the disk.
_EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}


def _is_finite(tensor: np.ndarray) -> bool:
    flat, exponent = tensor.reshape(-1), _EXPONENTS.get(tensor.dtype.name)
    chunks = (flat[at : at + _CHUNK] for at in range(0, flat.size, _CHUNK))
    if exponent is None:
        return all(bool(np.isfinite(chunk).all()) for chunk in chunks)
    return all(int((chunk.view(np.uint16) & exponent).max()) < exponent for chunk in chunks)


def _check_copy(
    folder: Path, module: str, copy: Half, base_weight: Callable[[str], np.ndarray] | None
) -> None:
    what = f"{printable(folder)}: {shown(copy.key, 200)}"
    if base_weight is None:
        raise ValueError(
            f"{what} is a copy of the base model's weight, which PEFT saves beside a LoRA of the "
            "output layer or the embedding; load it with AdapterBank.load, which compares the two, "
            "or save the adapter with save_pretrained(path, save_embedding_layers=False)"
        )
    base = base_weight(module)
    same = copy.shape == base.shape
    if same:
        stored = copy.read()
        rows = max(1, _CHUNK // max(1, stored.shape[-1]))
        same = all(
            _equal(stored[at : at + rows], base[at : at + rows])
            for at in range(0, len(stored), rows)
        )
    if not same:
        raise ValueError(
            f"{what} is a saved or resized layer, {[*copy.shape]}: it differs from the base "
            f"model's {[*base.shape]}, which is not supported; {MERGE}"
        )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether one is the other, maybe rounded to its own dtype."""
    return bool((a == b.astype(a.dtype)).all() or (a.astype(b.dtype) == b).all())


# ------------------------------------------------------------------------------------------------
# Opening an adapter's files
# ------------------------------------------------------------------------------------------------


@contextmanager
def _open(folder: Path, allow_links: bool, rename: Rename | None = None) -> Iterator[_Opened]:
    refuse_foreign(folder)
    check_folder(folder, _CONFIG)
    for wait in _WAITS:
        with ExitStack() as stack:
            data, identity = _config_data(folder, allow_links)
            reader = open_safetensors(folder, "adapter_model", allow_links=allow_links)
            files = stack.enter_context(reader)
            if not _belong_together(data, files, folder, identity):
                time.sleep(wait)
                continue
            yield _read_headers(folder, parse_json(data, folder / _CONFIG), files, rename)
            return
    raise ValueError(
        f"{printable(folder)}: {_CONFIG} is that of an earlier save than {_WEIGHTS}; a save is "
        "under way or was interrupted: save the adapter again"
    )


def _config_data(folder: Path, allow_links: bool) -> tuple[bytes, tuple[int, ...]]:
    with open_file(folder / _CONFIG, allow_links=allow_links) as stream:
        data = read_bounded(stream, folder / _CONFIG, _MAX_CONFIG_BYTES)
        return data, _identity(os.fstat(stream.fileno()))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _belong_together(
    config: bytes, files: list[TensorFile], folder: Path, identity: tuple[int, ...]
) -> bool:
    """Whether the config is the weights' own, or one that was edited or saved by other tools.

    The weights name two configs: their own, and the one that their save replaced. A save replaces
    weights first, so the latter shows a save that has not come to its end. A config that is neither
    is an edited one, if it has stayed where it is since it was read.
    """
    metadata = files[0].metadata
    digest = hashlib.sha256(config).hexdigest()
    if digest == metadata.get(_OWN):
        return True
    if digest == metadata.get(_REPLACED):
        return False
    try:
        return _identity(os.stat(folder / _CONFIG)) == identity
    except FileNotFoundError:
        return False


def _read_headers(
    folder: Path, values: JsonObject, files: list[TensorFile], rename: Rename | None
) -> _Opened:
    try:
        config, enabled = read_config(values), enabled_parts(values)
        choice = Choice.of(values, config)
        if enabled is not None:
            config = dense_config(config, sum(enabled))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{printable(folder / _CONFIG)}: {error}") from None
    found = _find_halves(folder, files, config)
    try:
        config, halves, experts, shared = apart(config, found.halves, choice.parameters)
    except ValueError as error:
        raise ValueError(f"{printable(folder)}: {error}") from None
    found = dataclasses.replace(found, halves=halves)
    length = max(map(len, [*found.halves, *found.wrapped.values()]), default=0)
    names = len(found.halves) + len(found.wrapped)
    if names * (config.work(length) + choice.work(length)) > MAX_WORK:
        raise ValueError(
            f"{printable(folder / _CONFIG)}: the patterns take too long for {len(found.halves)} "
            f"modules with names of up to {length} characters; name modules instead of using "
            "expressions"
        )
    shapes = {}
    for module, pair in found.halves.items():
        try:
            if module not in experts:  # their parameters are named
                _check_chosen(config, choice, module, found.wrapped.get(module, module))
            shapes[module] = _shape(config, module, pair, enabled)
        except ValueError as error:
            raise ValueError(f"{printable(folder)}: {error}") from None
    try:
        check_has_lora(shapes, [*found.full, *found.tokens])
    except ValueError as error:
        raise ValueError(f"{printable(folder)}: {error}") from None
    tokens = {
        module: _tokens_shape(folder, values, found, module, stored)
        for module, stored in found.tokens.items()
    }
    if not tokens and (given := values.get("trainable_token_indices")):
        raise ValueError(
            f"{printable(folder)} lacks the trained tokens of trainable_token_indices="
            f"{shown(given)}; save the adapter again"
        )
    new = new_names({**shapes, **found.copies, **found.full, **tokens}, rename)
    own = {module: new[module] for module in shapes}
    full = {new[m]: full_shape(t["weight"], t.get("bias")) for m, t in found.full.items()}
    return _Opened(
        AdapterHeader(
            renamed_config(config, own),
            {new[m]: shapes[m] for m in shapes},
            full,
            {new[m]: shape for m, shape in tokens.items()},
            {new[m]: half for m, half in shared.items()},
        ),
        {new[module]: pair for module, pair in found.halves.items()},
        {new[module]: copy for module, copy in found.copies.items()},
        {new[module]: stored for module, stored in found.full.items()},
        {new[module]: stored for module, stored in found.tokens.items()},
    )


def _tokens_shape(
    folder: Path, values: JsonObject, found: _Found, module: str, stored: Half
) -> TokensShape:
    try:
        indices = token_indices(values, module)
        shape = TokensShape(indices, stored.shape, stored.dtype, stored.nbytes)
        check_tokens(module, shape, {*found.halves, *found.full})
    except ValueError as error:
        raise ValueError(f"{printable(folder / _CONFIG)}: {error}") from None
    return shape


def _check_chosen(config: LoRAConfig, choice: Choice, module: str, wrapped: str) -> None:
    """Raises ValueError if PEFT would ignore the module, or maybe scale it in another way."""
    if not (choice.adapts(module) or choice.adapts(wrapped)):
        raise ValueError(
            f"{_CONFIG} leaves {module} out (by target_modules, exclude_modules or "
            "layers_to_transform), so that PEFT would ignore its weights; name the module there or "
            "remove the weights"
        )
    values = [(config.rank_of(name), config.alpha_of(name)) for name in (module, wrapped)]
    if values[0] != values[1]:
        raise ValueError(
            f"the patterns of {_CONFIG} give {module} rank and alpha {values[0]}, but {values[1]} "
            f"by its name in the file, {wrapped}; write patterns that match either name"
        )


def _shape(
    config: LoRAConfig, module: str, pair: dict[str, Half], enabled: tuple[bool, ...] | None
) -> LoRAShape:
    """The module's LoRA without its values; B in `pair` becomes dense."""
    if not {"A", "B"} <= pair.keys():
        raise ValueError(
            f"{module} has lora_{next(iter(pair))} but not the other half; save the adapter again"
        )
    if enabled is not None:
        pair["B"] = _grouped(module, pair["A"], pair["B"], enabled)
    a, b = pair["A"], pair["B"]
    check_halves(config, module, a, b)
    check_magnitude(config, module, pair.get("magnitude"), b)
    if a.is_embedding != b.is_embedding:
        raise ValueError(
            f"{module}: one half is that of an embedding and the other is not, {shown(a.key, 200)} "
            f"and {shown(b.key, 200)}; save the adapter again"
        )
    return LoRAShape(
        a.shape[1], b.shape[0], a.shape[0], config.scale_of(module),
        (a.dtype, b.dtype), sum(stored.nbytes for stored in pair.values()), a.is_embedding,
    )  # fmt: skip


def _grouped(module: str, a: Half, b: Half, enabled: tuple[bool, ...]) -> Grouped:
    count = sum(enabled)
    match a.shape, b.shape:
        # PEFT 0.2 always makes two groups, loralib one for each enabled part. More would let a
        # small file take much memory.
        case (rank, _), (rows, columns, 1) if (
            rank in (2 * columns, count * columns) and rows % count == rows % (rank // columns) == 0
        ):
            return Grouped(b.file, b.key, enabled, rank)
    raise ValueError(
        f"{module}: with enable_lora={shown([*enabled])} lora_A must be [{count} r, H] and lora_B "
        f"[{count} N / {len(enabled)}, r, 1], got {shown([*a.shape])} and {shown([*b.shape])}"
    )


def _check_name(folder: Path, module: str) -> None:
    try:
        check_module(module)
    except ValueError as error:
        raise ValueError(f"{printable(folder)}: {error}") from None


def _find_halves(folder: Path, files: list[TensorFile], config: LoRAConfig) -> _Found:
    found = _Found({}, {}, {}, {}, {})
    others: dict[str, Half] = {}
    adapters: set[str | None] = set()
    for file in files:
        for key in file.tensors:
            name = unwrapped(key) if len(key) <= _MAX_KEY else ""
            match = _KEY.fullmatch(name)
            of_dora = None if match else _MAGNITUDE.fullmatch(name)
            if match:
                module, adapter = match[1], match[3] or match[5]
                half = match[2] or match[4]
            elif of_dora:
                module, half, adapter = of_dora[1], "magnitude", of_dora[2]
            else:
                others[key] = Half(file, key)
                continue
            _check_name(folder, module)
            adapters.add(adapter)
            if half in found.halves.setdefault(module, {}) or len(adapters) > 1:
                raise ValueError(
                    f"{printable(folder)}: several adapters, {shown(sorted(map(str, adapters)))}, "
                    f"share the file, see {shown(key, 200)}; save each in a folder of its own"
                )
            found.halves[module][half] = Half(file, key)
            if name != key and (raw := _inner_name(key)) != module:
                found.wrapped[module] = raw
    for stored in others.values():
        _add_weight(folder, found, stored, config)
    for module, full in found.full.items():
        if "weight" not in full:
            raise ValueError(
                f"{printable(folder)}: {module} has a bias, but no weight; save the adapter again"
            )
        try:
            check_full(module, full_shape(full["weight"], full.get("bias")), found.halves)
        except ValueError as error:
            raise ValueError(f"{printable(folder)}: {error}") from None
    return found


def _add_weight(folder: Path, found: _Found, stored: Half, config: LoRAConfig) -> None:
    """Adds a tensor that is no half of a LoRA to what was found."""
    key = stored.key
    name = unwrapped(key) if len(key) <= _MAX_KEY else ""
    place: dict[str, Half]
    if match := _COPY.fullmatch(name):
        place, part = found.copies, match[1]
    elif match := _TOKENS.fullmatch(name):
        place, part = found.tokens, match[1]
    elif (match := _FULL.fullmatch(name)) and config.saves(match[1]):
        place, part = found.full.setdefault(match[1], {}), match[2]
    elif match and match[2] == "weight" and match[1].rpartition(".")[2] in _EMBEDDINGS:
        place, part = found.copies, match[1]
    else:
        what = next((name for part, name in _FOREIGN.items() if part in key), "unknown")
        raise ValueError(
            f"{printable(folder)}: {shown(key, 200)} is {what}, which is not supported: all "
            "weights must be base_model.model.<module>.lora_A.weight or lora_B, or of "
            f"modules_to_save; {MERGE}"
        )
    _check_name(folder, match[1])
    if part in place:
        raise ValueError(
            f"{printable(folder)}: {shown(place[part].key, 200)} and {shown(key, 200)} are the "
            "same weight of one module; save the adapter again"
        )
    place[part] = stored


def save_peft(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes the folder from which `peft.PeftModel.from_pretrained` reads the adapter back.

    Makes the folder where it is missing. Replaces `adapter_config.json` and
    `adapter_model.safetensors`, and touches no other file. `load_peft` meanwhile, or after a crash,
    never mixes the old files with the new: the weights' metadata names their config.

    Experts that share a half, by having one array for it, are one module in the file, in SGLang's
    and vLLM's layout: `experts.gate_proj` with A `[1, r, H]` and B `[experts, N, r]`. PEFT does not
    know these modules. It reads copies: give each expert an array of its own.

    Raises:
      ValueError: `path`, or a folder above it, is a file; or one of the two files is a folder.
    """
    folder = Path(path)
    config, modules = stacked(adapter)
    ranks = {module: config.rank_of(module) for module in modules}
    alphas = {module: config.alpha_of(module) for module in modules}
    # The first name that a module ends in counts, so a name comes before its ends.
    tokens = sorted(adapter.tokens.items(), key=lambda item: -len(item[0]))
    values = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": {**config.rank_pattern, **of_parameter(ranks, config.rank)},
        "alpha_pattern": {**config.alpha_pattern, **of_parameter(alphas, config.alpha)},
        "target_modules": _targets(modules),
        "modules_to_save": sorted(adapter.full) or None,
        "trainable_token_indices": {m: [*t.indices] for m, t in tokens} or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    tensors = {}
    for module, weights in modules.items():
        for half, tensor in (("A", weights.a), ("B", weights.b)):
            key = f"embedding_{half}" if weights.is_embedding else f"{half}.weight"
            tensors[f"base_model.model.{module}.lora_{key}"] = np.ascontiguousarray(tensor)
        if weights.magnitude is not None:
            key = f"base_model.model.{module}.lora_magnitude_vector"
            tensors[key] = np.ascontiguousarray(weights.magnitude)
    for module, full in adapter.full.items():
        for name, tensor in zip(("weight", "bias"), full.arrays):
            tensors[f"base_model.model.{module}.{name}"] = np.ascontiguousarray(tensor)
    for module, trained in tokens:
        key = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        tensors[key] = np.ascontiguousarray(trained.rows)
    for name in (_WEIGHTS, _CONFIG):
        if (folder / name).is_dir():
            raise ValueError(f"{printable(folder / name)} is a folder; remove it or save elsewhere")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{printable(folder)} is, or lies under, a file; give a folder to save the adapter in"
        ) from None
    # Not sort_keys, which sorts the patterns too: the first that matches counts.
    text = (json.dumps(dict(sorted(values.items())), indent=2) + "\n").encode()
    # A folder inside `folder`, as a rename is only atomic within one file system.
    with (
        _one_save_at_a_time(folder),
        tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary,
    ):
        metadata = {"format": "pt", _OWN: hashlib.sha256(text).hexdigest()}
        if (folder / _CONFIG).is_file():
            with open(folder / _CONFIG, "rb") as replaced:
                metadata[_REPLACED] = hashlib.file_digest(replaced, "sha256").hexdigest()
        with _written(Path(temporary, _WEIGHTS)) as stream:
            write_safetensors(stream, tensors, metadata)
        with _written(Path(temporary, _CONFIG)) as stream:
            stream.write(text)
        # The weights first, as they tell which config is theirs: see _belong_together.
        for name in (_WEIGHTS, _CONFIG):
            os.replace(Path(temporary, name), folder / name)


def _targets(modules: Collection[str]) -> list[str]:
    """The modules by name; of more than a config may name, as of many experts, the ends."""
    if len(modules) <= MAX_PATTERNS:
        return sorted(modules)
    return sorted({module.rpartition(".")[2] for module in modules})


@contextmanager
def _written(file: Path) -> Iterator[BinaryIO]:
    """A new file, whose bytes are on the disk at the end."""
    with open(file, "xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _one_save_at_a_time(folder: Path) -> Iterator[None]:
    """Locks the folder against other saves, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
