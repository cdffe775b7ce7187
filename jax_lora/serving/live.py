"""A model whose stacks other threads may load while it steps."""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from jax_lora.bank import guard_of
from jax_lora.models.llama import Llama
from jax_lora.sharding import AnyMesh


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What a model is but for its arrays, hashed once: jit looks at it at every step."""

    graphdef: nnx.GraphDef[Llama]
    treedef: jax.tree_util.PyTreeDef
    digest: int

    @classmethod
    def of(cls, graphdef: nnx.GraphDef[Llama], treedef: jax.tree_util.PyTreeDef) -> Self:
        return cls(graphdef, treedef, hash((graphdef, treedef)))

    def merge(self, leaves: list[Array]) -> Llama:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def __hash__(self) -> int:
        return self.digest

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Structure)
            and (self.digest, self.treedef, self.graphdef)
            == (other.digest, other.treedef, other.graphdef)
        )


class LiveModel:
    """Calls steps with the arrays that a model's variables hold at that time."""

    def __init__(self, model: Llama) -> None:
        self.guard = guard_of(model)
        with self.guard.lock:
            graphdef, self.state = nnx.split(model)  # holds the model's own variables
            self.writes = self.guard.writes
            self.leaves, treedef = jax.tree.flatten(self.state)
        self.structure = Structure.of(graphdef, treedef)

    @property
    def mesh(self) -> AnyMesh | None:
        """Over which its arrays are divided or copied; None on one device."""
        shardings = [leaf.sharding for leaf in self.leaves]
        return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)

    @property
    def is_on_one_device(self) -> bool:
        return all(len(leaf.sharding.device_set) == 1 for leaf in self.leaves)

    def call[T](self, step: Callable[..., T], *args: object) -> T:
        """`step` of the arrays that the variables hold now; a load waits until it is launched."""
        with self.guard.lock:
            if self.guard.writes != self.writes:
                self.writes, self.leaves = self.guard.writes, jax.tree.leaves(self.state)
            return step(self.structure, self.leaves, *args)
