"""LoRA adapters on the host: what one is, and reading and writing the files of Hugging Face PEFT.

Needs no device, no JAX and no torch. Everything read here may come from a stranger: nothing is
unpickled, sizes are checked before anything is allocated, and a PEFT feature is either exact or
refused by its name.
"""

import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_lora.patterns import MAX_PATTERNS, first_match, matcher

MAX_RANK = 4096
"""Largest rank of an adapter; a LoRA beyond it would be larger than the weights that it adapts."""

# ------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAConfig:
    """Ranks and scales of an adapter, with the meaning that they have in PEFT's `LoraConfig`.

    A module's delta is `scale * B @ A`, `scale = alpha / r`, or `alpha / sqrt(r)` for rsLoRA, where
    `r` and `alpha` are the module's own.

    Args:
      rank: rank of every module that `rank_pattern` doesn't name; 1 to `MAX_RANK`.
      alpha: the same for `alpha_pattern`; any finite number.
      rslora: rank-stabilised scale.
      target_modules: names, or suffixes of names, of the modules to adapt; or a regular
        expression over whole names, or `"all-linear"`; None for all.
      rank_pattern, alpha_pattern: from a pattern to the rank or alpha of modules that match it.
        The first pattern that matches counts. It matches as PEFT's do: `(.*\\.)?(pattern)$`.

    Raises:
      ValueError: a value is out of range, or a pattern uses regular expression syntax beyond
        characters, classes, groups, alternatives and the repeats `* + ?` (which is all that
        runs in linear time on any input).
    """

    rank: int
    alpha: float
    rslora: bool = False
    target_modules: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("rank", _rank(self.rank, "rank"))
        put("alpha", _alpha(self.alpha, "alpha"))
        if not isinstance(self.rslora, bool):
            raise TypeError(f"rslora must be True or False, got {self.rslora!r}")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            put("target_modules", tuple(_names(self.target_modules, "target_modules")))
        for name, check in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} must map patterns to numbers, got {patterns!r:.100}")
            if len(patterns) > MAX_PATTERNS:
                raise ValueError(f"{name} has {len(patterns)} patterns, at most {MAX_PATTERNS}")
            for pattern in patterns:
                matcher(pattern)
            put(name, {k: check(v, f"{name}[{k!r}]") for k, v in patterns.items()})

    def rank_of(self, module: str) -> int:
        """True rank of the module of this name."""
        return first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of the module of this name."""
        return first_match(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What `B @ A` of the module of this name is multiplied with."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names the module.

        A regular expression there is run as it is: don't call this on a stranger's config. The
        modules of an `Adapter` say what it adapts.
        """
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if not isinstance(self.target_modules, str):
            return _named(module, self.target_modules)
        try:
            return re.fullmatch(self.target_modules, module) is not None
        except re.error as error:
            raise ValueError(
                f"target_modules={self.target_modules!r} is no regular expression: {error}"
            ) from None


@dataclass(frozen=True)
class LoRAWeights:
    """One module's LoRA: `y += scale * (x @ a.T) @ b.T`.

    Args:
      a: `[r, H]`, the down-projection.
      b: `[N, r]`, the up-projection.
      scale: `LoRAConfig.scale_of` the module.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its config and the weights of each module that it adapts, by name.

    Raises:
      TypeError: weights that are not NumPy arrays.
      ValueError: weights that don't fit each other or the config; the message names the module.
    """

    config: LoRAConfig
    modules: Mapping[str, LoRAWeights]

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("an adapter needs the LoRA weights of at least one module, got none")
        for module, weights in self.modules.items():
            _check_weights(self.config, module, weights)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(weights.rank for weights in self.modules.values())

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weights; float32 where they have several."""
        dtypes = {t.dtype for weights in self.modules.values() for t in (weights.a, weights.b)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weights.a.nbytes + weights.b.nbytes for weights in self.modules.values())


def _check_weights(config: LoRAConfig, module: str, weights: LoRAWeights) -> None:
    if not (isinstance(module, str) and len(module) <= 512 and _MODULE.fullmatch(module)):
        raise ValueError(
            f"{module!r:.100} is not a module's name, such as 'model.layers.0.self_attn.q_proj': "
            "letters, digits, '_' and '-', with dots between, at most 512"
        )
    a, b = weights.a, weights.b
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        raise TypeError(
            f"{module}: LoRA weights must be NumPy arrays, got {type(a).__name__} and "
            f"{type(b).__name__}; np.asarray converts them"
        )
    for half, t in (("A", a), ("B", b)):
        if t.dtype not in _DTYPES.values():
            raise ValueError(
                f"{module}: lora_{half} has dtype {t.dtype}; adapters are float32, float16 or "
                "bfloat16"
            )
    if a.ndim == b.ndim == 4:
        raise ValueError(
            f"{module}: LoRA of a convolution ({[*a.shape]} and {[*b.shape]}) is not supported; "
            "train without this target module"
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise ValueError(
            f"{module}: lora_A must be [r, H] and lora_B [N, r], got {[*a.shape]} and {[*b.shape]}"
        )
    if weights.rank != config.rank_of(module):
        raise ValueError(
            f"{module}: the config says rank {config.rank_of(module)} but lora_A is {[*a.shape]}, "
            f"lora_B {[*b.shape]}, which is rank {weights.rank}; correct r or rank_pattern"
        )
    if not math.isclose(weights.scale, config.scale_of(module), rel_tol=1e-6):
        raise ValueError(
            f"{module}: the config says scale {config.scale_of(module)} (alpha "
            f"{config.alpha_of(module)}, rank {weights.rank}, rslora {config.rslora}) but the "
            f"weights {weights.scale}; correct alpha or alpha_pattern"
        )


_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def _rank(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{what} must be an integer, got {value!r:.100}")
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{what} must be between 1 and {MAX_RANK}, got {value!r:.100}")
    return int(value)


def _alpha(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{what} must be a number, got {value!r:.100}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # refuses NaN too
        raise ValueError(f"{what} must be finite in float32, got {value!r:.100}")
    return float(value)


def _names(value: Any, what: str) -> list[str]:
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(v, str) for v in value):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    raise TypeError(f"{what} must be a list of names, got {value!r:.100}")


def _named(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


# ------------------------------------------------------------------------------------------------
# PEFT's files
# ------------------------------------------------------------------------------------------------

# Keys of adapter_config.json that change nothing about what a saved adapter computes, whatever
# their value: they matter to training, to how PEFT finds modules (the weights' own names say
# which), or to how weights were initialised (see _EXACT_INITS). fan_in_fan_out describes how the
# base stores its weight; A and B are stored alike.
_IRRELEVANT = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights target_modules
    exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out megatron_core
    loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
    lora_dtype lorap_lr_ratio lorap_emb_lr
    """.split()  # the last line is ms-swift's
)

# Keys that change what an adapter computes, or which weights it has, and what to do about each.
_MERGE = "merge it into the base with peft's merge_and_unload and serve that"
_UNSUPPORTED = {
    "use_dora": f"DoRA is not supported; {_MERGE}",
    "modules_to_save": f"fully trained modules are not supported; {_MERGE}",
    "trainable_token_indices": f"trained tokens are not supported; {_MERGE}",
    "lora_bias": f"biases of lora_B are not supported; {_MERGE}",
    "layer_replication": f"replicated layers are not supported; {_MERGE}",
    "target_parameters": f"LoRA of bare parameters is not supported; {_MERGE}",
    "megatron_config": "Megatron's parallel layers are not supported; save the adapter without "
    "them",
    "alora_invocation_tokens": "aLoRA is not supported; train a plain LoRA",
    "use_qalora": "QA-LoRA is not supported; train a plain LoRA",
    "use_bdlora": "BD-LoRA's block-diagonal weights are not supported; train a plain LoRA",
    "arrow_config": "Arrow routing is not supported; load the adapters that it routes to",
    "velora_config": "VeLoRA is not supported; train a plain LoRA",
    "kasa_config": f"KaSA changes the base weights and is not supported; {_MERGE}",
    "monteclora_config": "MonteCLoRA is not supported; train a plain LoRA",
    "ensure_weight_tying": f"tied adapters of embeddings are not supported; {_MERGE}",
}

# Initialisations that leave the base weights alone, so that the saved A and B say everything. The
# others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract something from the base.
_EXACT_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.([^.]+))?\.weight", re.DOTALL)
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA of an embedding",
    "lora_diag": "KaSA",
    "lora_velora": "VeLoRA",
    "monteclora": "MonteCLoRA",
    "modules_to_save": "a fully trained module",
    "token_adapter": "trained tokens",
    "trainable_tokens": "trained tokens",
    "lora_E": "AdaLoRA",
    ".bias": "a bias",
    "embed_tokens": "a saved or resized embedding",
    "lm_head": "a saved or resized output layer",
}


def load_peft(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter from the folder in which PEFT saved it.

    The weights are NumPy arrays of the file's dtype (bfloat16 as `ml_dtypes.bfloat16`), read at the
    speed of the disk.
    Module names are those of the base model: PEFT's prefix `base_model.model.` is removed.

    Args:
      path: folder with `adapter_config.json` and `adapter_model.safetensors`, or its shards.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is truncated or malformed, config and weights disagree, or the adapter
        uses a feature of PEFT that is not supported. The message names the file, the values and
        the remedy.
    """
    folder = Path(path)
    values = read_json(folder, "adapter_config.json")
    try:
        config = _read_config(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'}: {error}") from None
    halves: dict[str, dict[str, np.ndarray]] = {}
    adapters = set()
    for key, tensor in read_safetensors(folder, "adapter_model").items():
        match = _KEY.fullmatch(key)
        if match is None:
            what = next((name for part, name in _FOREIGN.items() if part in key), "unknown")
            raise ValueError(
                f"{folder}: {key!r:.200} is {what}, which is not supported: all weights must be "
                f"base_model.model.<module>.lora_A.weight or lora_B; {_MERGE}"
            )
        module, half, adapter = match.groups()
        adapters.add(adapter)
        if half in halves.setdefault(module, {}) or len(adapters) > 1:
            raise ValueError(
                f"{folder}: several adapters, {sorted(map(str, adapters))}, share the file, see "
                f"{key!r:.200}; save each in a folder of its own"
            )
        halves[module][half] = tensor
    modules = {}
    for module, pair in halves.items():
        if len(pair) != 2:
            have = next(iter(pair))
            raise ValueError(
                f"{folder}: {module} has lora_{have} but not the other half; save the adapter again"
            )
        if _left_out(values, config, module):
            raise ValueError(
                f"{folder}: adapter_config.json leaves {module} out (by target_modules, "
                "exclude_modules or layers_to_transform), so that PEFT would ignore its weights; "
                "name the module there or remove the weights"
            )
        modules[module] = LoRAWeights(pair["A"], pair["B"], config.scale_of(module))
    try:
        return Adapter(config, modules)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _read_config(values: dict[str, Any]) -> LoRAConfig:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {values.get('peft_type')!r:.100}; only 'LORA' is supported")
    for key, value in values.items():
        if not value or key in _IRRELEVANT:
            continue  # None, False and empty switch a feature off, also one not invented yet
        remedy = _UNSUPPORTED.get(
            key, "this key is unknown, so that its meaning would be lost; remove it if it has none"
        )
        raise ValueError(f"{key}={value!r:.100}: {remedy}")
    if values.get("bias") not in (None, "none"):
        raise ValueError(
            f"bias={values['bias']!r:.100}: trained biases are not supported; {_MERGE}"
        )
    init = values.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _EXACT_INITS:
        raise ValueError(
            f"init_lora_weights={init!r:.100} is unknown or changed the base weights, so that the "
            "adapter doesn't fit the original base; convert it with peft's save_pretrained(path, "
            "path_initial_model_for_weight_conversion=...)"
        )
    if "r" not in values or "lora_alpha" not in values:
        raise ValueError(
            "r and lora_alpha are required; save the adapter with peft's save_pretrained"
        )
    return LoRAConfig(
        rank=_rank(values["r"], "r"),
        alpha=_alpha(values["lora_alpha"], "lora_alpha"),
        rslora=values.get("use_rslora") or False,
        target_modules=values.get("target_modules"),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )


def _left_out(values: dict[str, Any], config: LoRAConfig, module: str) -> bool:
    """Whether PEFT's lists leave the module out; its regular expressions are not run."""
    excluded, layers = values.get("exclude_modules"), values.get("layers_to_transform")
    if isinstance(excluded, list) and _named(module, map(str, excluded)):
        return True
    if not isinstance(config.target_modules, tuple) or module in config.target_modules:
        return False
    if not _named(module, config.target_modules):
        return True
    if layers is None or layers == [] or values.get("layers_pattern"):
        return False
    index = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return index is None or int(index[1]) not in (layers if isinstance(layers, list) else [layers])


def save_peft(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes the folder from which `peft.PeftModel.from_pretrained` reads the adapter back.

    Makes the folder where it is missing. Replaces `adapter_config.json` and
    `adapter_model.safetensors`, each at once, and touches no other file.

    Raises:
      ValueError: `path`, or a folder above it, is a file; or one of the two files is a folder.
    """
    folder = Path(path)
    config = adapter.config
    values = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "use_rslora": config.rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": sorted(adapter.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    tensors = {}
    for module, weights in adapter.modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(weights.a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(weights.b)
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; remove it or save elsewhere")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{folder} is, or lies under, a file; give a folder to save the adapter in"
        ) from None
    # A folder inside `folder`, as a rename is only atomic within one file system.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        save_file(tensors, Path(temporary, names[0]), metadata={"format": "pt"})
        Path(temporary, names[1]).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        for name in names:
            os.replace(Path(temporary, name), folder / name)


# ------------------------------------------------------------------------------------------------
# JSON and safetensors (also used for base models)
# ------------------------------------------------------------------------------------------------

_MAX_JSON_BYTES = 64 << 20
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: not a folder, or not a JSON object.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}; nothing is downloaded, give a local folder"
        )
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the folder that holds {name}")
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {name}")
    if (size := file.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{file} has {size} bytes; at most {_MAX_JSON_BYTES} are read")
    return _parse_json(file.read_bytes(), file)


def _parse_json(data: bytes, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is truncated or not JSON ({error}); save or download it again"
        ) from None
    match values:
        case dict():
            return values
    raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}")


def read_safetensors(folder: Path, stem: str) -> dict[str, np.ndarray]:
    """All tensors of `stem.safetensors`, or of its shards, in the files' dtypes.

    Raises:
      FileNotFoundError: no such file, or a shard is missing.
      ValueError: a file is truncated or malformed, a tensor is not float32, float16 or bfloat16,
        or there is only a pickle.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        return _read_file(folder / f"{stem}.safetensors")
    if index.is_file():
        expected = read_json(folder, index.name).get("weight_map")
        if not (isinstance(expected, dict) and all(isinstance(v, str) for v in expected.values())):
            raise ValueError(
                f"{index} has no weight_map from tensors to files; save the model again"
            )
        names = sorted(set(expected.values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
                raise ValueError(
                    f"{index} names {name!r:.100}; a shard must be a .safetensors file in the same "
                    "folder"
                )
    else:
        shard = re.compile(re.escape(stem) + r"-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
        counts = {m[2] for file in folder.iterdir() if (m := shard.fullmatch(file.name))}
        if not counts:
            _refuse_pickle(folder, stem)
            raise FileNotFoundError(f"{str(folder)!r} has no {stem}.safetensors")
        if len(counts) > 1:
            raise ValueError(
                f"{folder} holds several sets of shards, of {sorted(counts)} files; remove the "
                "stale ones"
            )
        (count,) = counts
        expected = None
        names = [f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} lacks the shard {name}, one of {len(names)}")
        shard_tensors = _read_file(folder / name)
        if twice := tensors.keys() & shard_tensors.keys():
            raise ValueError(f"{folder / name} holds {min(twice)!r}, which another shard holds too")
        tensors |= shard_tensors
    if expected is not None and (missing := expected.keys() - tensors.keys()):
        raise ValueError(
            f"{index} lists {min(missing)!r}, which no shard holds; save the model again"
        )
    return tensors


def _refuse_pickle(folder: Path, stem: str) -> None:
    for name in (f"{stem}.bin", f"{stem}.pt", f"{stem}.pth", "pytorch_model.bin"):
        if (source := folder / name).is_file():
            code = (
                "import sys, torch; from safetensors.torch import save_file; "
                "weights = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
                "save_file({k: v.clone().contiguous() for k, v in weights.items()}, sys.argv[2])"
            )
            target = folder / f"{stem}.safetensors"
            raise ValueError(
                f"{source} is a pickle, which can run code when it is opened, and is not read. "
                "Convert it with:\n"
                f'python -c "{code}" {shlex.quote(str(source))} {shlex.quote(str(target))}'
            )


def _read_file(file: Path) -> dict[str, np.ndarray]:
    tensors = {}
    try:
        with safe_open(file, framework="np") as stored:
            for key in stored.keys():  # noqa: SIM118  (not a mapping)
                entry = stored.get_slice(key)
                if entry.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{file}: {key!r:.200} has dtype {entry.get_dtype()}; save it as one of "
                        f"{', '.join(_DTYPES)}"
                    )
                if 0 in entry.get_shape():
                    raise ValueError(
                        f"{file}: {key!r:.200} is empty, {entry.get_shape()}; DeepSpeed ZeRO-3 and "
                        "FSDP must gather weights before saving"
                    )
                tensors[key] = stored.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file "
            f"({error}); save or download it again"
        ) from None
    return tensors
