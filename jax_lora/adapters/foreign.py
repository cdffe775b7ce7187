"""LoRA as other projects save it: mlx-lm, qwix (with which Tunix trains), diffusers, kohya.

Each says the same as PEFT in other names and shapes. What it says is converted exactly, or refused
by its name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from jax_lora.adapters.config import MERGE, read_config
from jax_lora.adapters.files import (
    JsonObject,
    check_folder,
    open_safetensors,
    parse_json,
    read_json,
)
from jax_lora.adapters.names import config_of
from jax_lora.adapters.types import Adapter, LoRAConfig, LoRAWeights, finite_number
from jax_lora.messages import printable, shown

type Tree = ArrayLike | Mapping[str, Tree] | Mapping[int, Tree]

_CONFIG = "adapter_config.json"
_MAX_KEY = 1024
_MAX_NESTING = 64

_TUNIX = (
    "a checkpoint of Orbax, as Tunix saves; restore it with Tunix, and in Python: "
    "from jax_lora.adapters import from_qwix, save_peft; "
    "state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)); "
    "save_peft(from_qwix(state, alpha=...), FOLDER)"
)
_CONVERTED = {
    "adapters.safetensors": "an adapter of mlx-lm",
    "pytorch_lora_weights.safetensors": "a LoRA of diffusers",
}
_NOT_CONVERTED = {
    "adapters.npz": "an adapter of an early mlx-lm; train it again with one that writes "
    "adapters.safetensors",
    "_CHECKPOINT_METADATA": _TUNIX,
    "model_params": _TUNIX,
}

# How the key of a tensor ends, in each project's files, and which half of a LoRA it is then.
_ENDS = {
    "mlx": {".lora_a": "A", ".lora_b": "B"},
    "qwix": {"_lora_a": "A", "_lora_b": "B"},
    "diffusers": {
        f".{name}.weight": half
        for name, half in {
            "lora_A": "A",
            "lora_B": "B",
            "lora_down": "A",
            "lora_up": "B",
            "lora.down": "A",
            "lora.up": "B",
            "lora_linear_layer.down": "A",
            "lora_linear_layer.up": "B",
        }.items()
    },
}
_ALPHA = ".alpha"

# The models of a pipeline of diffusers, each of which has a LoRA of its own.
_COMPONENTS = frozenset(
    "unet transformer transformer_2 text_encoder text_encoder_2 text_encoder_3 "
    "diffusion_model".split()
)
_KOHYA = (
    "a weight as kohya's scripts name it, with '_' for each dot, so that the file does not say "
    "which module it adapts; load it with pipe.load_lora_weights of diffusers, save the LoRA of "
    "each model, such as pipe.unet.save_lora_adapter(FOLDER), and convert that folder"
)
_REFUSED = {
    "lora_embedding_": f"LoRA of an embedding, which is not converted; {MERGE}",
    "dora_scale": f"DoRA, which is not supported; {MERGE}",
    "lora_magnitude_vector": f"DoRA, which is not supported; {MERGE}",
    "hada_": "LoHa, which is not supported; train a LoRA",
    "lokr_": "LoKr, which is not supported; train a LoRA",
    "lora_mid": "LoRA of a convolution, which is not supported; train without it",
    ".diff": f"a change of a whole weight, which is not supported; {MERGE}",
    ".bias": f"a bias, which is not supported; {MERGE}",
}
_EMBEDDINGS = frozenset({"wte", "wpe"})  # besides names with "embed"


def is_foreign(path: Path) -> bool:
    """Whether `path` is, by its name or a file in it, what `read_foreign` reads."""
    if (path / "adapter_model.safetensors").exists():
        return False
    return _is_file(path) or _mark(path, _CONVERTED) is not None


def _is_file(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.is_file()


def refuse_foreign(folder: Path) -> None:
    """Raises ValueError, which says what to do, if `folder` holds another project's LoRA."""
    command = f"`jax-lora convert {printable(folder)} NEW_FOLDER` writes it as PEFT does"
    if _is_file(folder):
        raise ValueError(
            f"{printable(folder)} is a file, and PEFT's adapters are folders; {command}"
        )
    if (folder / "adapter_model.safetensors").exists():
        return
    if mark := _mark(folder, _CONVERTED):
        raise ValueError(f"{printable(folder)} is {_CONVERTED[mark]}; {command}")
    if mark := _mark(folder, _NOT_CONVERTED):
        raise ValueError(f"{printable(folder)} is {_NOT_CONVERTED[mark]}")


def _mark(folder: Path, names: Iterable[str]) -> str | None:
    return next((name for name in names if (folder / name).exists()), None)


def read_foreign(
    path: Path, *, alpha: float | None = None, allow_links: bool = False
) -> dict[str, Adapter]:
    """The adapters in another project's folder or safetensors file, by the model that they adapt.

    A file of diffusers may adapt several models of a pipeline, such as `unet` and `text_encoder`;
    otherwise the only key is "".

    Args:
      path: a folder of mlx-lm or diffusers; or a file of diffusers, qwix or mlx-lm.
      alpha: PEFT's, which makes the scale `alpha / rank`, for a file that does not say it.

    Raises:
      FileNotFoundError, ValueError: a file is missing, malformed, of an unknown project, or says
        what PEFT's LoRA of linear layers can't. The message says what to do.
    """
    if _is_file(path):
        folder, stem = path.parent, path.stem
    else:
        check_folder(path, "the LoRA")
        mark = _mark(path, _CONVERTED)
        if mark is None:
            refuse_foreign(path)
            raise FileNotFoundError(
                f"{shown(str(path), 300)} has none of {', '.join(_CONVERTED)}; if the LoRA has "
                "another name, give the .safetensors file itself"
            )
        folder, stem = path, mark.removesuffix(".safetensors")
    with open_safetensors(folder, stem, allow_links=allow_links) as files:
        try:
            pairs = _Pairs.of(key for file in files for key in file.tensors)
        except ValueError as error:
            raise ValueError(f"{printable(path)}: {error}") from None
        values: JsonObject = {}
        if pairs.project == "mlx" and stem == "adapters":
            values = read_json(folder, _CONFIG, allow_links=allow_links)
        elif text := files[0].metadata.get("lora_adapter_metadata"):
            values = parse_json(text.encode(), files[0].path)
        tensors = {key: file.read(key) for file in files for key in file.tensors}
    try:
        return _READERS[pairs.project](pairs, tensors, values, alpha)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{printable(path)}: {error}") from None


def from_qwix(state: Tree, *, alpha: float) -> Adapter:
    """The LoRA of a model that qwix or Tunix has trained.

    Example::

        state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
        save_peft(from_qwix(state, alpha=32), "french")

    Modules have their paths for names, joined by dots. The weight's axes that x is multiplied with
    come first in A, `[..., r]`, the others last in B, `[r, ...]`; each becomes one axis, in the
    weight's order. The layout is that of qwix's `LoraProvider` (qwix/_src/providers/lora.py).

    Args:
      state: arrays, by name, in nested mappings.
      alpha: the provider's, which makes the scale `alpha / rank`.

    Raises:
      TypeError: alpha is no number.
      ValueError: an entry is no LoRA of qwix, or PEFT's LoRA of linear layers can't say it.
    """
    tensors = {".".join(path): np.asarray(leaf) for path, leaf in _leaves(state)}
    pairs = _Pairs.of(tensors)
    if pairs.project != "qwix":
        raise ValueError(f"{shown(min(tensors))} is not named as qwix names a LoRA, *_lora_a")
    return _of_qwix(pairs, tensors, {}, alpha)[""]


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ArrayLike]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    if len(path) > _MAX_NESTING:
        raise ValueError(f"the state nests more than {_MAX_NESTING} mappings, at {shown(path)}")
    for name, below in tree.items():
        yield from _leaves(below, (*path, str(name)))


@dataclass(frozen=True)
class _Pairs:
    """The keys of a file: those of each module's halves, "A" and "B", and of its alpha."""

    project: str
    halves: dict[str, dict[str, str]] = field(default_factory=dict)
    alphas: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[str]) -> "_Pairs":
        keys = list(keys)
        found = {key: _ending(key) for key in keys if not key.endswith(_ALPHA)}
        projects = sorted({project for project, _ in found.values()})
        if len(projects) != 1:
            raise ValueError(
                f"a file must hold the LoRA of one project, got {', '.join(projects) or 'none'}"
            )
        pairs = cls(projects[0])
        for key, (project, end) in found.items():
            module, half = key.removesuffix(end), _ENDS[project][end]
            if project == "qwix":  # of the weight's name, mostly w or kernel
                module = module.rpartition(".")[0]
            if half in pairs.halves.setdefault(module, {}):
                raise ValueError(
                    f"{shown(module)} has LoRA of several weights, {shown(key)} and "
                    f"{shown(pairs.halves[module][half])}, which PEFT can't say"
                )
            pairs.halves[module][half] = key
        for pair in pairs.halves.values():
            if len(pair) != 2:
                raise ValueError(f"{shown(min(pair.values()))} has no other half; save it again")
        for key in keys:
            if key.endswith(_ALPHA):
                if (module := key.removesuffix(_ALPHA)) not in pairs.halves:
                    raise ValueError(f"{shown(key)} is the alpha of no LoRA")
                pairs.alphas[module] = key
        return pairs


def _ending(key: str) -> tuple[str, str]:
    """Whose key it is, and its known end. ValueError if it is nobody's, or is not converted."""
    if key.startswith(("lora_", "lycoris_")):
        raise ValueError(f"{shown(key, 200)} is {_KOHYA}")
    if key.startswith("base_model."):
        raise ValueError(f"{shown(key, 200)} is PEFT's; give the folder that holds {_CONFIG} too")
    for project, ends in _ENDS.items() if len(key) <= _MAX_KEY else ():
        for end in ends:
            if key.endswith(end):
                return project, end
    if key.endswith(".m"):
        raise ValueError(f"{shown(key, 200)} is {_REFUSED['dora_scale']}")
    for part, what in _REFUSED.items():
        if part in key:
            raise ValueError(f"{shown(key, 200)} is {what}")
    raise ValueError(
        f"{shown(key, 200)} is unknown; LoRA of mlx-lm (*.lora_a), qwix (*_lora_a) and diffusers "
        "(*.lora_A.weight, *.lora_down.weight) is converted"
    )


type _Arrays = Mapping[str, np.ndarray]


def _of_mlx(
    pairs: _Pairs, tensors: _Arrays, values: JsonObject, alpha: float | None
) -> dict[str, Adapter]:
    """mlx-lm (mlx_lm/tuner/lora.py): A `[H, r]`, B `[r, N]`, delta `scale * x @ A @ B`."""
    if values.get("fine_tune_type", "lora") != "lora":
        raise ValueError(
            f"fine_tune_type={shown(values['fine_tune_type'])} is not LoRA; fuse it into its base "
            "by mlx_lm.fuse"
        )
    weights = {}
    for module, pair in pairs.halves.items():
        _refuse_embedding(module)
        a, b = tensors[pair["A"]], tensors[pair["B"]]
        if not a.ndim == b.ndim == 2:
            raise ValueError(
                f"{shown(module)} is LoRA of stacked layers, such as experts, {[*a.shape]} and "
                f"{[*b.shape]}, which is not supported; train without it"
            )
        weights[module] = a.T, b.T
    ranks = sorted({a.shape[0] for a, _ in weights.values()})
    alphas = {module: _mlx_alpha(values, a.shape[0], alpha) for module, (a, _) in weights.items()}
    stated = (values.get("lora_parameters") or {}).get("rank")
    if stated is not None and ranks != [stated]:
        raise ValueError(f"{_CONFIG} says rank {shown(stated)}, and the weights {shown(ranks)}")
    return {"": _adapter(weights, alphas)}


def _mlx_alpha(values: JsonObject, rank: int, alpha: float | None) -> float:
    parameters = values.get("lora_parameters")
    if parameters is None:
        return _needed(alpha, f"there are no lora_parameters in a {_CONFIG} of mlx-lm")
    if not isinstance(parameters, dict):
        raise ValueError(f"lora_parameters must be an object, got {shown(parameters)}")
    scale = finite_number(parameters.get("scale"), "scale of lora_parameters")
    early = parameters.get("alpha")
    if early is None or early == rank:
        _unneeded(alpha)
        return scale * rank
    early = finite_number(early, "alpha of lora_parameters")
    return _needed(
        alpha,
        f"its lora_parameters have an alpha. Early versions of mlx-lm used it, for a scale of "
        f"{scale * early / rank:g}: give alpha {scale * early:g}. Later ones did not, for "
        f"{scale:g}: give alpha {scale * rank:g}",
    )


def _of_qwix(
    pairs: _Pairs, tensors: _Arrays, values: JsonObject, alpha: float | None
) -> dict[str, Adapter]:
    """See `from_qwix`."""
    del values
    alpha = _needed(alpha, "it is the alpha of qwix's LoraProvider, which no file holds")
    weights = {}
    for module, pair in pairs.halves.items():
        _refuse_embedding(module)
        a, b = tensors[pair["A"]], tensors[pair["B"]]
        shapes = f"{[*a.shape]} and {[*b.shape]}"
        if min(a.ndim, b.ndim) < 2 or a.shape[-1] != b.shape[0]:
            raise ValueError(f"{shown(module)}: A must be [..., r] and B [r, ...], got {shapes}")
        if a.ndim > 2 and any(word in module.lower() for word in ("expert", "moe")):
            raise ValueError(
                f"{shown(module)} is LoRA of experts, {shapes}, which is not supported; train "
                "without it"
            )
        weights[module] = a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T
    return {"": _adapter(weights, dict.fromkeys(weights, alpha))}


def _of_diffusers(
    pairs: _Pairs, tensors: _Arrays, values: JsonObject, alpha: float | None
) -> dict[str, Adapter]:
    """diffusers: PEFT's matrices; alpha in a tensor of its own, in a config, or else the rank."""
    if values or pairs.alphas:
        _unneeded(alpha)
    if values and pairs.alphas:
        raise ValueError("it says alpha twice, in tensors and in its metadata; remove either")
    models: dict[str, dict[str, str]] = {}
    for module in pairs.halves:
        first, _, rest = module.partition(".")
        model, name = (first, rest) if first in _COMPONENTS else ("", module)
        models.setdefault(model, {})[name] = module
    adapters = {}
    for model, modules in models.items():
        weights, alphas = {}, {}
        for name, module in modules.items():
            a, b = (tensors[pairs.halves[module][half]] for half in "AB")
            if a.ndim == 0:
                raise ValueError(f"{shown(module)}: lora_A must be [r, H], got a number")
            weights[name] = a, b
            if (key := pairs.alphas.get(module)) is not None:
                alphas[name] = _number(key, tensors[key])
            elif model:  # diffusers' rule
                _unneeded(alpha)
                alphas[name] = float(a.shape[0])
            elif not values:
                alphas[name] = _needed(alpha, f"no tensor or metadata says that of {shown(name)}")
        own = {
            k.removeprefix(f"{model}."): v for k, v in values.items() if k.startswith(f"{model}.")
        }
        config = read_config(own or values) if values else None
        if config is not None and config.dora:
            raise ValueError(f"use_dora=True: DoRA is not supported in this form; {MERGE}")
        adapters[model] = _adapter(weights, alphas, config)
    return adapters


def _number(key: str, tensor: np.ndarray) -> float:
    if tensor.size != 1:
        raise ValueError(f"{shown(key)} must be a number, got {[*tensor.shape]}")
    return finite_number(float(tensor.reshape(())), printable(key))


def _adapter(
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]],
    alphas: Mapping[str, float],
    config: LoRAConfig | None = None,
) -> Adapter:
    if config is None:
        config = config_of({module: a.shape[0] for module, (a, _) in weights.items()}, alphas)
    return Adapter(
        config,
        {
            module: LoRAWeights(
                np.ascontiguousarray(a), np.ascontiguousarray(b), config.scale_of(module)
            )
            for module, (a, b) in weights.items()
        },
    )


def _needed(alpha: float | None, why: str) -> float:
    if alpha is None:
        raise ValueError(f"alpha is needed (--alpha), which makes the scale alpha / rank: {why}")
    return finite_number(alpha, "alpha")


def _unneeded(alpha: float | None) -> None:
    if alpha is not None:
        raise ValueError(f"alpha={alpha:g} is given, but the file says its own scale; leave it out")


def _refuse_embedding(module: str) -> None:
    last = module.rpartition(".")[2]
    if "embed" in last.lower() or last in _EMBEDDINGS:
        raise ValueError(f"{shown(module)} is {_REFUSED['lora_embedding_']}")


type _Reader = Callable[[_Pairs, _Arrays, JsonObject, float | None], dict[str, Adapter]]
_READERS: dict[str, _Reader] = {"mlx": _of_mlx, "qwix": _of_qwix, "diffusers": _of_diffusers}
