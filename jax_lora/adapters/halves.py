"""Where the halves of a module's LoRA stand in files, and in which form."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from jax_lora.adapters.files import DTYPES, TensorFile


@dataclass(frozen=True)
class Half:
    """Where half of a module's LoRA is stored."""

    file: TensorFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.key].shape

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.file.tensors[self.key].dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_embedding(self) -> bool:
        return ".lora_embedding_" in self.key

    def read(self) -> np.ndarray:
        return self.file.read(self.key)


@dataclass(frozen=True)
class Grouped(Half):
    """B of a layer with `enable_lora`, as the dense `[N, R]` that computes the same.

    PEFT 0.2 stores a convolution `[n, R / groups, 1]`: each of its groups takes its own rows of A
    and gives its own part of n columns. These are the columns of the enabled ones among the equal
    parts of the layer's output; the others stay as they are.
    """

    enabled: tuple[bool, ...]
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        width = super().shape[0] // sum(self.enabled)
        return width * len(self.enabled), self.rank

    def read(self) -> np.ndarray:
        stored = super().read()
        rows, columns, _ = stored.shape
        groups = self.rank // columns
        dense = np.zeros(self.shape, stored.dtype)
        places = np.flatnonzero(np.repeat(self.enabled, rows // sum(self.enabled)))
        for group, (part, where) in enumerate(
            zip(np.split(stored, groups), places.reshape(groups, -1))
        ):
            dense[where, group * columns : (group + 1) * columns] = part[..., 0]
        return dense


@dataclass(frozen=True)
class Stacked:
    """A half of the LoRA of all experts as one tensor, `[experts, ...]`, or `[1, ...]` if they
    share it."""

    half: Half

    @functools.cached_property
    def matrices(self) -> list[np.ndarray]:
        """One for each expert; what they share is one array, by which it is known as such."""
        return list(self.half.read())


@dataclass(frozen=True)
class StackedHalf(Half):
    """A half of one expert's LoRA, which stands at `place` among those of all."""

    stacked: Stacked
    place: int

    @property
    def shape(self) -> tuple[int, ...]:
        return super().shape[1:]

    def read(self) -> np.ndarray:
        return self.stacked.matrices[self.place]


@dataclass(frozen=True)
class Fused:
    """A half of the LoRA of all experts, which PEFT stores as one tensor for a parameter.

    A is `[experts * r, H]`, the ranks of each expert together; B is `[N, r * experts]`, the experts
    of each rank together.
    """

    half: Half
    experts: int
    is_b: bool

    @functools.cached_property
    def array(self) -> np.ndarray:
        """`[experts, r, H]` or `[experts, N, r]`."""
        stored = self.half.read()
        if not self.is_b:
            return stored.reshape(self.experts, -1, stored.shape[1])
        return np.moveaxis(stored.reshape(stored.shape[0], -1, self.experts), 2, 0)


@dataclass(frozen=True)
class ExpertHalf(Half):
    """A half of one expert's LoRA, of its rows `[start, stop)`: gate and up share a parameter."""

    fused: Fused
    expert: int
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = super().shape
        if not self.fused.is_b:
            return rows // self.fused.experts, columns
        return self.rows.stop - self.rows.start, columns // self.fused.experts

    def read(self) -> np.ndarray:
        return self.fused.array[self.expert, self.rows]
