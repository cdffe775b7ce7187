"""Rotary embeddings: the frequencies of each kind of scaling, and the rotation itself.

A config names a kind in `rope_scaling`, or in `rope_parameters` since version 5 of Transformers.
What each kind computes, and what it takes where a config leaves a number out, is that of
Transformers.
"""

import dataclasses
import math
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_lora.messages import shown
from jax_lora.models.families import Json


def check_positive(name: str, value: object) -> None:
    """Raises ValueError if the value of a config is not a positive number."""
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be a positive number, got {shown(value)}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are changed for contexts longer than those of the training.

    Attributes:
      factor: how many times longer.
    """

    factor: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) or (field.type == float | None and value is not None):
                check_positive(field.name, value)
            elif field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, got {shown(value)}")

    @classmethod
    def of(cls, values: Json) -> Self:
        """From the object in a `config.json`."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        found = {name: values[name] for name in fields if values.get(name) is not None}
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - found.keys()):
            raise ValueError(f"the scaling of rotary embeddings lacks {', '.join(missing)}")
        return cls(**found)

    @property
    def magnitude(self) -> float:
        """What sine and cosine are multiplied with."""
        return 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> np.ndarray:
        """`[dim / 2]`, for a sequence of `length` positions."""
        return plain_frequencies(theta, dim) / np.float32(self.factor)


class LinearScaling(RopeScaling):
    """Positions are divided by the factor."""


@dataclasses.dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """theta grows with the sequence, once that is longer than those of the training (NTK)."""

    original_max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, length: int) -> np.ndarray:
        stretch = max(length / self.original_max_position_embeddings, 1.0)
        grown = self.factor * stretch - (self.factor - 1)
        return plain_frequencies(theta * grown ** (dim / (dim - 2)), dim)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's: slow frequencies are divided, fast ones kept, those between are blended."""

    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def frequencies(self, theta: float, dim: int, length: int) -> np.ndarray:
        frequencies = plain_frequencies(theta, dim)
        # Turns over the original context: few turns are stretched, many are kept.
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(np.clip(kept, 0.0, 1.0), frequencies, self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071): a ramp over the dimensions between divided and kept frequencies."""

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def grown(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)

    def frequencies(self, theta: float, dim: int, length: int) -> np.ndarray:
        def dimension(turns: float) -> float:
            """The one whose frequency makes so many turns over the original context."""
            positions = self.original_max_position_embeddings
            return dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001)
        return _blend(1 - np.clip(ramp, 0.0, 1.0), plain_frequencies(theta, dim), self.factor)


@dataclasses.dataclass(frozen=True)
class LongScaling(RopeScaling):
    """LongRoPE, as in Phi-3: a divisor per frequency, of which there are two sets.

    A sequence beyond the original positions takes `long_factor`, from its first position on.
    """

    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short_factor", "long_factor"):
            if not isinstance(divisors := getattr(self, name), list | tuple):
                raise ValueError(f"{name} must be a list of numbers, got {shown(divisors)}")
            for divisor in divisors:
                check_positive(name, divisor)
            object.__setattr__(self, name, tuple(divisors))

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        original = math.log(self.original_max_position_embeddings)
        return math.sqrt(1 + math.log(self.factor) / original)

    def frequencies(self, theta: float, dim: int, length: int) -> np.ndarray:
        is_long = length > self.original_max_position_embeddings
        divisors = self.long_factor if is_long else self.short_factor
        if len(divisors) != dim // 2:
            raise ValueError(
                f"{'long' if is_long else 'short'}_factor must have a number for each of the "
                f"{dim // 2} rotary frequencies, got {len(divisors)}"
            )
        return plain_frequencies(theta, dim) / np.array(divisors, np.float32)


def _blend(kept: np.ndarray, frequencies: np.ndarray, factor: float) -> np.ndarray:
    return (kept * frequencies + (1 - kept) * frequencies / factor).astype(np.float32)


def plain_frequencies(theta: float, dim: int) -> np.ndarray:
    """`theta ** (-2 i / dim)`, `[dim / 2]`."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


_KINDS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongScaling,
    "su": LongScaling,  # its first name
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding of a model.

    Attributes:
      theta: the base of the frequencies.
      scaling: None for the plain frequencies.
      partial_rotary_factor: the share of a head's dimensions that is rotated; the others are kept.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive("rope_theta", self.theta)
        check_positive("partial_rotary_factor", self.partial_rotary_factor)
        if self.partial_rotary_factor > 1:
            raise ValueError(
                f"partial_rotary_factor must be at most 1, got {self.partial_rotary_factor}"
            )

    @classmethod
    def of(cls, rope: Json, positions: object, theta: object) -> Self:
        """From a config's object for it, and what the config says beside it.

        Args:
          rope: `rope_scaling` or `rope_parameters`.
          positions: the model's `max_position_embeddings`.
          theta: for an object without `rope_theta`.
        """
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "yarn" and "short_factor" in rope:
            kind = "longrope"  # as early Phi-3s call it
        scaling = None
        if kind != "default":
            if not (isinstance(kind, str) and kind in _KINDS):
                known = ", ".join(["default", *_KINDS])
                raise ValueError(f"rope_type={shown(kind)} is not supported; known are {known}")
            scaling = _KINDS[kind].of(_with_lengths(kind, rope, positions))
        found = {
            "theta": rope.get("rope_theta", theta),
            "scaling": scaling,
            "partial_rotary_factor": rope.get("partial_rotary_factor"),
        }
        return cls(**{key: value for key, value in found.items() if value is not None})

    def check(self, head_dim: int) -> None:
        """Raises ValueError if heads of this size can't be rotated so."""
        dim = int(head_dim * self.partial_rotary_factor)
        if dim % 2 or dim < 2:
            raise ValueError(
                f"head_dim must be even for rotary embeddings, got {head_dim} of which {dim} rotate"
            )
        if isinstance(self.scaling, DynamicScaling) and dim < 4:
            raise ValueError(f"rope_type='dynamic' takes heads of at least 4, got {head_dim}")
        try:
            for length in (1, 1 << 24):  # LongRoPE has a list of divisors for each
                self.angles(head_dim, length)
        except ArithmeticError as error:
            raise ValueError(
                f"rope_theta={self.theta} and {shown(self.scaling)} give no frequencies: {error}"
            ) from None

    def angles(self, head_dim: int, length: int) -> tuple[np.ndarray, float]:
        """The frequencies of a head, for sequences of `length`, and the factor of their waves."""
        dim = int(head_dim * self.partial_rotary_factor)
        if self.scaling is None:
            return plain_frequencies(self.theta, dim), 1.0
        return self.scaling.frequencies(self.theta, dim, length), self.scaling.magnitude


def _with_lengths(kind: str, rope: Json, positions: object) -> dict[str, object]:
    """`rope` with the numbers that follow from the model's positions."""
    found = dict(rope)
    # The dynamic kind begins to stretch where the model's positions end, whatever rope says.
    if kind == "dynamic" or found.get("original_max_position_embeddings") is None:
        found["original_max_position_embeddings"] = positions
    original = found["original_max_position_embeddings"]
    can_follow = kind in ("yarn", "longrope", "su") and found.get("factor") is None
    if can_follow and isinstance(positions, int) and isinstance(original, int) and original > 0:
        found["factor"] = positions / original
    return found


def waves(
    rope: Rope, head_dim: int, positions: Int[Array, "B S"], length: int
) -> tuple[Float[Array, "B S 1 D"], Float[Array, "B S 1 D"]]:
    """Cosine and sine of each position, for `rotate`."""
    frequencies, magnitude = rope.angles(head_dim, length)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: Float[Array, "B S N D"], rope: tuple[Array, Array]) -> Float[Array, "B S N D"]:
    """Heads turned by the angles of their positions; dimensions without an angle stay."""
    cos, sin = (t.astype(x.dtype) for t in rope)
    turned = cos.shape[-1]
    low, high, rest = x[..., :turned], x[..., turned : 2 * turned], x[..., 2 * turned :]
    return jnp.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)
