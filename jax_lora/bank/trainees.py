"""Which adapters a training step moves, as data of the step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Array

from jax_lora.adapters import finite_number
from jax_lora.batch import Lease
from jax_lora.messages import shown


class Turns(NamedTuple):
    """What a step does with each slot of a rank bucket; arrays are `[L]`.

    Attributes:
      serials: int32, the number of the adapter that the step moves; 0 where it moves none.
      rates: float32, what the adapter's updates are multiplied with.
    """

    serials: np.ndarray | Array
    rates: np.ndarray | Array


@jax.tree_util.register_pytree_node_class
class Trainees:
    """The adapters that a training step moves: a pytree that `jit` takes as an argument.

    `AdapterBank.trainees` makes it. While it is referenced, its adapters keep their slots. Its
    arrays have the same shapes for any adapters of a bank, so that a step never compiles again.

    Attributes:
      by_bucket: the slots of each rank bucket.
    """

    def __init__(self, by_bucket: Mapping[int, Turns], lease: Lease | None = None) -> None:
        self.by_bucket = dict(by_bucket)
        self._lease = lease

    def tree_flatten(self) -> tuple[tuple[dict[int, Turns]], None]:
        return (self.by_bucket,), None  # without the lease, as jit keeps trees for ever

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[dict[int, Turns]]) -> Self:
        trainees = object.__new__(cls)
        (trainees.by_bucket,) = children
        trainees._lease = None
        return trainees

    def __repr__(self) -> str:
        return f"Trainees({shown(self.by_bucket)})"


def checked_rates(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """The rate of each name, 1 where none is given. An error for what is no rate of these."""
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates must map names to numbers, got {shown(rates)}")
    if unknown := [name for name in rates if name not in names]:
        raise ValueError(f"rates names {shown(unknown)}, which the step does not train")
    checked = dict.fromkeys(names, 1.0)
    for name, rate in rates.items():
        checked[name] = finite_number(rate, f"the rate of {shown(name)}")
    return checked
