"""Who owns a model's stacks: one bank at a time, one writer at a time, in one process."""

import threading
import weakref
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lora.bank.agreement import Agreement
from jax_lora.bank.sites import common_slots
from jax_lora.batch import Guard, Lock
from jax_lora.nn.full import FullRoom, FullWeights
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.names import ModulePath, Shape, array_shapes, numbered_names, path_name
from jax_lora.nn.stacks import LoRAScale, LoRAStack
from jax_lora.process import check_process, undivided

# The owner of each layer, by the layer's id: an owner that lives keeps its layers alive.
_OWNERS: weakref.WeakValueDictionary[int, "StackOwner"] = weakref.WeakValueDictionary()


class StackOwner:
    """The owner of a model's stacks, until another one takes over: the base of a bank.

    Attributes:
      state: see `AdapterBank`.
    """

    def __init__(self, model: nnx.Module) -> None:
        check_process()
        self._model = model
        self._layers = {
            path_name(path): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, LoRALayer)
        }
        if not self._layers:
            raise ValueError("the model has no LoRA layers; call jax_lora.apply_lora(model) first")
        self._slots = common_slots(self._layers)
        for layer in self._layers.values():
            layer.place()  # the model may have moved to a mesh since it has stacks
        self.state = nnx.from_flat_state(
            [
                ((*path, name), value)
                for path, module in nnx.iter_modules(model)
                if isinstance(module, LoRAStack | LoRALayer | FullRoom | FullWeights)
                for name, value in vars(module).items()
                if isinstance(value, nnx.LoRAParam | LoRAScale)
            ]
        )
        self._agreement = Agreement(jax.tree.leaves(self.state))
        self._lock = threading.RLock()  # of what the host knows; taken after `stepping`
        self._guard = Guard()
        self._is_current = False

    def _own_names(self) -> dict[str, str]:
        """Each layer's path as a name, with a `{}` for the number of a layer that is stacked."""
        leads: dict[ModulePath, Shape] = {
            path: module.lead
            for path, module in nnx.iter_modules(self._model)
            if isinstance(module, LoRALayer)
        }
        return numbered_names(self._array_shapes(), leads)

    def _array_shapes(self) -> dict[ModulePath, Shape]:
        # Without stacks: those of experts have no axis of these in front.
        return array_shapes(self._model, nnx.Not(nnx.LoRAParam))

    @property
    def stepping(self) -> Lock:
        return self._guard.lock

    def _take_over(self) -> None:
        """Ends the owners that had the layers before, and keeps what their batches lease."""
        undivided(self._claim)

    def _claim(self) -> None:
        before, layers = self._owners_before(), list(self._layers.values())
        if before:
            guard = before[0]._guard
        else:
            guard = next((g for layer in layers if (g := layer.guard)), self._guard)
            if not guard.claim(layers[0]):
                # A copy of a model that has a bank: from now on another model, with its own arrays,
                # as `nnx.clone` shares them and a load would delete both.
                guard = self._guard
                for _, variable in nnx.to_flat_state(self.state):
                    variable.set_value(jnp.copy(variable.get_value()))
        guard.claim(layers[0])
        for owner in before:
            with owner._lock:
                owner._is_current = False
                guard.leases.update(owner._guard.leases)
        for layer in layers:
            if layer.guard is not guard:
                layer.guard = guard
        _OWNERS.update((id(layer), self) for layer in layers)
        self._guard, self._is_current = guard, True

    def _owners_before(self) -> list["StackOwner"]:
        there = (_OWNERS.get(id(layer)) for layer in self._layers.values())
        return list(dict.fromkeys(owner for owner in there if owner is not None))

    def _check_current(self) -> None:
        check_process()
        if not self._is_current:
            raise RuntimeError("another AdapterBank of this model has taken over its slots")

    def _write(self, commit: Callable[[], None]) -> None:
        """`commit()`, with both locks, and not divided by what signal handlers raise."""
        if self.stepping._is_owned():
            raise RuntimeError(
                "this thread holds bank.stepping, so nothing can be loaded: a load deletes the "
                "arrays that the step reads; load outside of the block"
            )

        def locked() -> None:
            with self.stepping, self._lock:
                self._check_current()
                commit()

        undivided(locked)


def guard_of(model: nnx.Module) -> Guard:
    """What the banks of the model share, those to come too; a guard of nothing if it has no LoRA.

    For code that steps while other threads load and does not know the bank::

        guard = guard_of(model)
        with guard.lock:                       # each step
            if guard.writes != seen:
                seen, arrays = guard.writes, [variable.get_value() for variable in variables]
            y = step(arrays, x, batch)
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoRALayer) and module.guard is not None:
            return module.guard
    return Guard()
