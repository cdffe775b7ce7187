"""What a LoRA adapter is, on the host: its config and the weights of each module."""

import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from jax_lora.adapters.files import DTYPES
from jax_lora.adapters.patterns import MAX_PATTERNS, Expression, Names, Patterns
from jax_lora.messages import shown

type DType = np.dtype[Any]
"""NumPy's dtype of any kind."""

if TYPE_CHECKING:
    import jax

    Half = np.ndarray | jax.Array
else:
    Half = object  # `inspect` reads adapters without JAX; `_is_array` checks what is given

SharedHalf = Literal["A", "B"]
"""The half of a LoRA that all experts of a layer share."""

EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(.+)")
"""The name of a module of one expert: of what holds the experts, its number, and its own."""

MAX_RANK = 4096
"""Largest rank of an adapter; a LoRA beyond it would be larger than the weights that it adapts."""

MAX_DOTS = 32
"""Most dots in a module's name."""

_MAX_SAVED = 256  # modules to save; they are a few of the model's outer layers

OUTPUT_LAYERS = frozenset({"lm_head", "embed_out"})
"""Names of output layers, which PEFT's `"all-linear"` leaves out."""


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
        expression over whole names; or `"all-linear"`, in any letter case, for all but the output
        layer (`lm_head`, `embed_out`); None for all.
      rank_pattern, alpha_pattern: from a pattern to the rank or alpha of modules that match it.
        The first pattern that matches counts. It matches as PEFT's do: `(.*\\.)?(pattern)$`.
      dora: DoRA, PEFT's `use_dora`: modules have a magnitude too, see `LoRAWeights`.
      modules_to_save: names, or ends of names, of layers for which an adapter has a whole weight.

    Raises:
      ValueError: a value is out of range, or a regular expression uses syntax beyond characters,
        classes, groups, alternatives, look-ahead and repeats that don't nest (which is all that
        runs in bounded time on any input).
    """

    rank: int
    alpha: float
    rslora: bool = False
    target_modules: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("rank", rank_in(self.rank, "rank"))
        put("alpha", finite_number(self.alpha, "alpha"))
        for name in ("rslora", "dora"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {shown(value)}")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            put("target_modules", tuple(names_of(self.target_modules, "target_modules")))
        put("modules_to_save", tuple(names_of(self.modules_to_save, "modules_to_save")))
        if "" in self.modules_to_save or len(self.modules_to_save) > _MAX_SAVED:
            raise ValueError(
                f"modules_to_save must be at most {_MAX_SAVED} names, none of them empty, got "
                f"{shown(self.modules_to_save)}"
            )
        for name, check in (("rank_pattern", rank_in), ("alpha_pattern", finite_number)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} must map patterns to numbers, got {shown(patterns)}")
            if len(patterns) > MAX_PATTERNS:
                raise ValueError(f"{name} has {len(patterns)} patterns, at most {MAX_PATTERNS}")
            values = {k: check(v, f"{name}[{shown(k)}]") for k, v in patterns.items()}
            put(name, values)
        for compiled in (self._ranks, self._alphas, self._target):
            del compiled  # made here, so that a malformed pattern is an error here

    # No fields: they follow from the fields.

    @cached_property
    def _ranks(self) -> Patterns[int]:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns[float]:
        return Patterns(self.alpha_pattern)

    @cached_property
    def _target(self) -> Names | Expression | None:
        if self.target_modules is None or self.all_linear:
            return None
        return matcher(self.target_modules)

    @property
    def all_linear(self) -> bool:
        """Whether `target_modules` is PEFT's word for all layers but embeddings and outputs."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def work(self, length: int) -> int:
        """Steps that the patterns take for a module whose name has this length."""
        target = 0 if self._target is None else self._target.work(length)
        return target + self._ranks.work(length) + self._alphas.work(length)

    def rank_of(self, module: str) -> int:
        """True rank of the module of this name."""
        found = self._ranks.first(module)
        return self.rank if found is None else found

    def alpha_of(self, module: str) -> float:
        """Alpha of the module of this name."""
        found = self._alphas.first(module)
        return self.alpha if found is None else found

    def scale_of(self, module: str) -> float:
        """What `B @ A` of the module of this name is multiplied with."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module, or one that it is in, as PEFT does: by how
        the name ends."""
        parts = module.split(".")
        names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(name.endswith(self.modules_to_save) for name in names)

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names the module."""
        if self._target is not None:
            return self._target.matches(module)
        return not (self.all_linear and module.rpartition(".")[2] in OUTPUT_LAYERS)


def matcher(names: str | tuple[str, ...]) -> Names | Expression:
    """PEFT's meaning of a list of names, or of a regular expression over whole names."""
    return Expression(names) if isinstance(names, str) else Names(frozenset(names))


@dataclass(frozen=True)
class LoRAWeights:
    """One module's LoRA: `y += scale * (x @ a.T) @ b.T`.

    With DoRA the whole weight, `w + scale * b @ a`, has the direction of its rows alone from there:
    `y = (magnitude / norm of each row) * (x @ w.T + scale * (x @ a.T) @ b.T) + bias`. In
    an embedding, x are tokens: `y += scale * a[:, x].T @ b.T`.

    Args:
      a: `[r, H]`, the down-projection; of an embedding, H is the vocabulary. NumPy's, or JAX's.
      b: `[N, r]`, the up-projection; likewise.
      scale: `LoRAConfig.scale_of` the module.
      is_embedding: whether it is that of an embedding.
      magnitude: `[N]` with DoRA, else None.
    """

    a: Half
    b: Half
    scale: float
    is_embedding: bool = False
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> "LoRAShape":
        return LoRAShape(
            self.a.shape[1], self.b.shape[0], self.rank, self.scale,
            (self.a.dtype, self.b.dtype), self.a.nbytes + self.b.nbytes
            + (0 if self.magnitude is None else self.magnitude.nbytes),
            self.is_embedding,
        )  # fmt: skip


@dataclass(frozen=True)
class LoRAShape:
    """A module's LoRA without its values. `dtypes` are those of A and B. For an embedding,
    `in_features` is the vocabulary."""

    in_features: int
    out_features: int
    rank: int
    scale: float
    dtypes: tuple[DType, DType]
    nbytes: int
    is_embedding: bool = False

    @property
    def dtype(self) -> DType:
        """float32 where the halves differ."""
        return common_dtype([*self.dtypes])

    def nbytes_of(self, half: SharedHalf) -> int:
        """The bytes of one half."""
        of_a, of_b = self.dtypes
        if half == "A":
            return self.rank * self.in_features * of_a.itemsize
        return self.rank * self.out_features * of_b.itemsize


@dataclass(frozen=True)
class FullModule:
    """A module's own weight in place of the base model's; PEFT calls it a module to save.

    Args:
      weight: `[N, H]`; of an embedding, `[vocabulary, features]`.
      bias: `[N]`, if the module has one.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape(self) -> "FullShape":
        return full_shape(self.weight, self.bias)


@dataclass(frozen=True)
class FullShape:
    """A whole weight without its values. `bias`: its shape, if there is one."""

    shape: tuple[int, ...]
    bias: tuple[int, ...] | None
    dtype: DType
    nbytes: int

    @property
    def has_bias(self) -> bool:
        return self.bias is not None


@dataclass(frozen=True)
class TokensShape:
    """Trained tokens without their values."""

    indices: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: DType
    nbytes: int


@dataclass(frozen=True)
class TrainedTokens:
    """Rows of an embedding, or of an output layer, in place of the base model's.

    Args:
      indices: the tokens.
      rows: `[len(indices), features]`.
    """

    indices: tuple[int, ...]
    rows: np.ndarray

    @property
    def shape(self) -> TokensShape:
        return TokensShape(self.indices, self.rows.shape, self.rows.dtype, self.rows.nbytes)


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter without its values: what its files say before a tensor is read.

    Attributes:
      shared: the half that experts have in common, by the name of each one's module. The shapes of
        all of these modules have its bytes.
    """

    config: LoRAConfig
    modules: Mapping[str, LoRAShape]
    full: Mapping[str, FullShape] = field(default_factory=dict)
    tokens: Mapping[str, TokensShape] = field(default_factory=dict)
    shared: Mapping[str, SharedHalf] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(shape.rank for shape in self.modules.values())

    @property
    def dtype(self) -> DType:
        """Dtype of the weights; float32 where they have several."""
        return common_dtype([shape.dtype for shape in self.modules.values()])

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        lora = sum(shape.nbytes for shape in self.modules.values()) - self._repeated
        whole = sum(shape.nbytes for shape in self.full.values())
        return lora + whole + sum(shape.nbytes for shape in self.tokens.values())

    @property
    def _repeated(self) -> int:
        """The bytes of what experts share, but for the first of each layer."""
        counted, repeated = set[str](), 0
        for module, half in self.shared.items():
            stack, shape = expert_stack(module), self.modules[module]
            if stack in counted:
                repeated += shape.nbytes_of(half)
            counted.add(stack)
        return repeated


def expert_stack(module: str) -> str:
    """What the modules of all experts are called that this one is among: its name without its
    number. The name itself, if it is none of an expert."""
    match = EXPERT.fullmatch(module)
    return f"{match[1]}.{match[3]}" if match else module


def shared_halves(modules: Mapping[str, LoRAWeights]) -> dict[str, SharedHalf]:
    """The half that experts have in common, by module: all of a layer have one array for it."""
    stacks: dict[str, list[str]] = {}
    for module in modules:
        if EXPERT.fullmatch(module):
            stacks.setdefault(expert_stack(module), []).append(module)
    found: dict[str, SharedHalf] = {}
    for names in stacks.values():
        own = [modules[name] for name in names]
        if len(own) > 1 and all(weights.a is own[0].a for weights in own):
            found |= dict.fromkeys(names, "A")
        elif len(own) > 1 and all(weights.b is own[0].b for weights in own):
            found |= dict.fromkeys(names, "B")
    return found


def common_dtype(dtypes: list[DType]) -> DType:
    """The dtype of all; float32 where they have several."""
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its config and the weights of each module that it adapts, by name.

    Args:
      full: the modules for which it has whole weights, besides those that it adapts.
      tokens: the embeddings and output layers of which it has some rows.

    Raises:
      TypeError: weights that are neither NumPy's nor JAX's arrays.
      ValueError: weights that don't fit each other or the config; the message names the module.
    """

    config: LoRAConfig
    modules: Mapping[str, LoRAWeights]
    full: Mapping[str, FullModule] = field(default_factory=dict)
    tokens: Mapping[str, TrainedTokens] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_has_lora(self.modules, [*self.full, *self.tokens])
        for module, weights in self.modules.items():
            _check_weights(self.config, module, weights)
        for module, whole in self.full.items():
            check_full(module, whole.shape, self.modules)
        for module, tokens in self.tokens.items():
            check_tokens(module, tokens.shape, {*self.modules, *self.full})

    @property
    def header(self) -> AdapterHeader:
        """The adapter without its values."""
        shapes = {module: weights.shape for module, weights in self.modules.items()}
        full = {module: whole.shape for module, whole in self.full.items()}
        tokens = {module: trained.shape for module, trained in self.tokens.items()}
        return AdapterHeader(self.config, shapes, full, tokens, shared_halves(self.modules))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(weights.rank for weights in self.modules.values())

    @property
    def dtype(self) -> DType:
        """Dtype of the weights; float32 where they have several."""
        return self.header.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.header.nbytes


def check_has_lora(modules: Collection[str], others: Collection[str]) -> None:
    """Raises ValueError if an adapter has LoRA of no module. `others`: those that it has whole, or
    tokens of."""
    if modules:
        return
    message = "an adapter needs the LoRA weights of at least one module, got none"
    if others:
        message += (
            f" beside the weights of {shown([*others])}; write these into a copy of the base "
            "model, or train the adapter with target_modules too"
        )
    raise ValueError(message)


def _is_array(half: object) -> bool:
    if isinstance(half, np.ndarray):
        return True
    jax = sys.modules.get("jax")  # who has one of its arrays has imported it
    return jax is not None and isinstance(half, jax.Array)


def _check_weights(config: LoRAConfig, module: str, weights: LoRAWeights) -> None:
    check_module(module)
    a, b = weights.a, weights.b
    if not all(map(_is_array, (a, b))):
        raise TypeError(
            f"{module}: LoRA weights must be NumPy's or JAX's arrays, got {type(a).__name__} and "
            f"{type(b).__name__}; np.asarray converts them"
        )
    check_halves(config, module, a, b)
    check_magnitude(config, module, weights.magnitude, b)
    if not math.isclose(weights.scale, config.scale_of(module), rel_tol=1e-6):
        raise ValueError(
            f"{module}: the config says scale {config.scale_of(module)} (alpha "
            f"{config.alpha_of(module)}, rank {weights.rank}, rslora {config.rslora}) but the "
            f"weights {shown(weights.scale)}; correct alpha or alpha_pattern"
        )


def check_module(module: str) -> None:
    """Raises ValueError if this is no module's name."""
    fits = isinstance(module, str) and len(module) <= 512 and module.count(".") <= MAX_DOTS
    if not (fits and _MODULE.fullmatch(module)):
        raise ValueError(
            f"{shown(module)} is not a module's name, such as 'model.layers.0.self_attn.q_proj': "
            f"letters, digits, '_' and '-', at most 512, with at most {MAX_DOTS} dots between"
        )


class Matrix(Protocol):
    """An array, or what a file's header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> DType: ...


def check_halves(config: LoRAConfig, module: str, a: Matrix, b: Matrix) -> None:
    """Raises ValueError if the halves fit neither each other nor the config."""
    for half, t in (("A", a), ("B", b)):
        if t.dtype not in DTYPES.values():
            raise ValueError(
                f"{module}: lora_{half} has dtype {t.dtype}; adapters are float32, float16 or "
                "bfloat16"
            )
    if len(a.shape) == len(b.shape) == 4:
        raise ValueError(
            f"{module}: LoRA of a convolution ({_shapes(a, b)}) is not supported; train without "
            "this target module"
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise ValueError(f"{module}: lora_A must be [r, H] and lora_B [N, r], got {_shapes(a, b)}")
    rank = config.rank_of(module)
    if a.shape[0] != rank:
        raise ValueError(
            f"{module}: the config says rank {rank} but lora_A is {[*a.shape]}, lora_B "
            f"{[*b.shape]}, which is rank {a.shape[0]}; correct r or rank_pattern"
        )


def check_magnitude(config: LoRAConfig, module: str, magnitude: Matrix | None, b: Matrix) -> None:
    """Raises ValueError if a module's magnitude fits neither the config nor B."""
    if magnitude is None and config.dora:
        raise ValueError(f"{module} has no magnitude, but the config says DoRA; save it again")
    if magnitude is None:
        return
    if not config.dora:
        raise ValueError(f"{module} has a magnitude of DoRA, but the config says no DoRA")
    if magnitude.shape != (width := b.shape[:1]) or magnitude.dtype not in DTYPES.values():
        raise ValueError(
            f"{module}: the magnitude of DoRA must be {shown([*width])} of float32, float16 or "
            f"bfloat16, got {shown([*magnitude.shape])} of {magnitude.dtype}"
        )


def full_shape(weight: Matrix, bias: Matrix | None) -> FullShape:
    arrays = [weight] if bias is None else [weight, bias]
    sizes = (math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    dtype = common_dtype([array.dtype for array in arrays])
    return FullShape(weight.shape, None if bias is None else bias.shape, dtype, sum(sizes))


def check_full(module: str, full: FullShape, adapted: Collection[str]) -> None:
    """Raises ValueError if this is no whole weight of a layer, or LoRA adapts the layer too."""
    check_module(module)
    if module in adapted:
        raise ValueError(f"{module} has both LoRA and a whole weight; leave out one of them")
    if len(full.shape) != 2 or 0 in full.shape or full.dtype not in DTYPES.values():
        raise ValueError(
            f"{module}: a fully trained module with a weight {shown([*full.shape])} of "
            f"{full.dtype} is not supported: linear layers and embeddings in float32, float16 or "
            "bfloat16 are"
        )
    if full.bias not in (None, full.shape[:1]):
        raise ValueError(
            f"{module}: the bias of a fully trained module must be {[full.shape[0]]}, as its "
            f"weight is {[*full.shape]}, got {shown([*full.bias])}"
        )


def check_tokens(module: str, tokens: TokensShape, others: Collection[str]) -> None:
    """Raises ValueError if these are no rows of a layer, or the layer has LoRA or is whole."""
    check_module(module)
    if module in others:
        raise ValueError(
            f"{module} has trained tokens beside LoRA or a whole weight; leave out one of them"
        )
    indices, shape = tokens.indices, tokens.shape
    if len(shape) != 2 or 0 in shape or tokens.dtype not in DTYPES.values():
        raise ValueError(
            f"{module}: trained tokens must be [tokens, features] in float32, float16 or bfloat16, "
            f"got {shown([*shape])} of {tokens.dtype}"
        )
    if len(indices) != shape[0] or len({*indices}) != len(indices) or min(indices) < 0:
        raise ValueError(
            f"{module}: {shape[0]} trained tokens need as many indices, not negative and each "
            f"once, got {shown([*indices])}"
        )


def _shapes(a: Matrix, b: Matrix) -> str:
    return f"{shown([*a.shape])} and {shown([*b.shape])}"


_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def rank_in(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{what} must be an integer, got {shown(value)}")
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{what} must be between 1 and {MAX_RANK}, got {shown(value)}")
    return int(value)


def finite_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{what} must be a number, got {shown(value)}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # refuses NaN too
        raise ValueError(f"{what} must be finite in float32, got {shown(value)}")
    return float(value)


def names_of(value: Any, what: str) -> list[str]:
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(v, str) for v in value):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    raise TypeError(f"{what} must be a list of names, got {shown(value)}")
