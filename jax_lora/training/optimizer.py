"""`per_adapter`: any optax transformation, of each adapter for itself."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jax_lora.bank.trainees import Trainees, Turns
from jax_lora.messages import shown
from jax_lora.training.stacks import Stacks, without_axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerAdapterState:
    """The state of `per_adapter`, by rank bucket.

    Attributes:
      serials: `[L]` int32, whose state each slot has: the number of a load; 0 for nobody's.
      inner: the wrapped transformation's state, each array with an axis of slots more.
      slot_axes: of each bucket, in order, that axis of each array of `inner`. What has a
        parameter's name and shape has it where the parameter has it, so that a step updates
        both in place. The others have it in front.
    """

    serials: dict[int, Array]
    inner: dict[int, PyTree]
    slot_axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})


def per_adapter(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` for each adapter alone, of all that a step trains.

        for adapter in trainees:
            if state[adapter.slot] is another adapter's: state[adapter.slot] = tx.init(adapter)
            updates, state[adapter.slot] = tx.update(gradients, state[adapter.slot], adapter)

    Example::

        tx = per_adapter(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
        trainees = bank.trainees(["french", "legal"], rates={"legal": 0.5})
        optimizer.update(model, gradients, trainees=trainees)    # in the jitted step

    An adapter gets what `tx` would give it alone: its moments, step count, norms and schedules are
    its own. One that is not among `trainees` keeps its weights and its state, bit for bit. One that
    is new in its slot starts with a new state, whoever had the slot before. Adapters join and leave
    without a compilation.

    `tx` sees the arrays of one adapter: a dict from "layers.q_proj.0.lora_a" (the layer's path, the
    output slice, the half) to A `[*lead, R, H]` or B `[*lead, N, R]`. So a function of names, as
    `optax.multi_transform` and `optax.masked` take it, tells A from B. R is the bucket's rank, with
    zeros behind the adapter's own. Layers stacked for a scan are one array, as for optax elsewhere:
    what takes a norm for each array (lamb, lars) takes one norm over them. So are the experts of a
    layer, one below the other. What takes means over an array, as adafactor does, counts the zeros.

    State takes what `tx` takes for all slots of the model. On a mesh of devices, make it inside
    `jax.set_mesh(mesh)`, so that it is divided as the stacks are.

    Args:
      tx: any transformation of gradients. `optax.MultiSteps(...).gradient_transformation()`
        accumulates for each adapter the steps in which it takes part.

    Returns:
      A transformation whose `update` needs the parameters, and `trainees=`, an argument as
      `AdapterBank.trainees` makes it.

    Raises:
      TypeError: `tx` is no transformation. By `update`: `trainees` are none, or there are other
        arguments, such as `value`: a loss of all adapters together would couple them.
      ValueError: an array is no stack of adapters; `trainees` are of a model with other slots.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"per_adapter takes an optax transformation, got {shown(tx)}")

    def init(params: PyTree) -> PerAdapterState:
        stacks = Stacks.of(params)
        serials, inner, axes = {}, {}, {}
        for bucket, arrays in stacks.split(params).items():
            serials[bucket] = jnp.zeros(stacks.slots[bucket], jnp.int32)
            own = _state_axes(tx, arrays, stacks.axes(bucket))
            inner[bucket] = jax.vmap(tx.init, (stacks.axes(bucket),), own)(arrays)
            axes[bucket] = tuple(jax.tree.leaves(own))
        return PerAdapterState(serials, inner, tuple(axes[bucket] for bucket in sorted(axes)))

    def update(
        updates: PyTree,
        state: PerAdapterState,
        params: PyTree = None,
        *,
        trainees: Trainees | None = None,
        **others: object,
    ) -> tuple[PyTree, PerAdapterState]:
        if params is None:
            raise ValueError("update needs the parameters, as its third argument")
        stacks = Stacks.of(params)
        turns = _checked(stacks, trainees, others)
        gradients, weights = stacks.split(updates), stacks.split(params)
        serials, inner, moves = {}, {}, {}
        for bucket, own in turns.items():
            moves[bucket], serials[bucket], inner[bucket] = _update_bucket(
                tx, stacks.axes(bucket), own, gradients[bucket], weights[bucket],
                (state.serials[bucket], state.inner[bucket]),
            )  # fmt: skip
        return stacks.join(moves), PerAdapterState(serials, inner, state.slot_axes)

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(
    stacks: Stacks, trainees: Trainees | None, others: dict[str, object]
) -> dict[int, Turns]:
    """The turns of each bucket."""
    if not isinstance(trainees, Trainees):
        raise TypeError(
            "update needs trainees=, the adapters that the step moves, as bank.trainees(names) "
            f"makes it; got {shown(trainees)}"
        )
    if others:
        raise TypeError(
            f"per_adapter takes no {', '.join(sorted(others))}: it would be that of all adapters"
        )
    slots = {bucket: np.shape(turns.serials)[0] for bucket, turns in trainees.by_bucket.items()}
    if slots != stacks.slots:
        raise ValueError(
            f"trainees are of a model with slots {slots}, but the parameters have {stacks.slots}; "
            "A of experts counts with its B alone, so train both, or B"
        )
    return trainees.by_bucket


def _state_axes(
    tx: optax.GradientTransformation, weights: dict[str, Array], axes: Mapping[str, int]
) -> PyTree:
    """The axis of slots of each array of a bucket's state, by `PerAdapterState.slot_axes`."""
    shapes = {name: without_axis(weights[name].shape, axis) for name, axis in axes.items()}
    slot = {n: jax.ShapeDtypeStruct(shapes[n], weights[n].dtype) for n in shapes}

    def axis(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> int:
        keys = [getattr(key, "key", None) for key in path]
        named = next((key for key in reversed(keys) if key in shapes), None)
        return axes[named] if named and shapes[named] == leaf.shape else 0

    return jax.tree_util.tree_map_with_path(axis, jax.eval_shape(tx.init, slot))


def _update_bucket(
    tx: optax.GradientTransformation,
    axes: dict[str, int],
    turns: Turns,
    gradients: dict[str, Array],
    weights: dict[str, Array],
    state: tuple[Array, PyTree],
) -> tuple[dict[str, Array], Array, PyTree]:
    """The updates of a bucket's arrays, and the state after them: serials and `tx`'s own."""

    def update_slot(
        turn: Turns,
        gradient: dict[str, Array],
        weight: dict[str, Array],
        serial: Array,
        own: PyTree,
    ) -> tuple[dict[str, Array], Array, PyTree]:
        is_moved = turn.serials > 0
        before = _select(turn.serials == serial, own, tx.init(weight))
        moves, after = tx.update(gradient, before, weight)
        moves = jax.tree.map(lambda move: move * jnp.asarray(turn.rates, move.dtype), moves)
        still = jax.tree.map(jnp.zeros_like, moves)
        return (
            _select(is_moved, moves, still),
            jnp.where(is_moved, turn.serials, serial),
            _select(is_moved, after, own),
        )

    own_axes = _state_axes(tx, weights, axes)
    mapped = jax.vmap(
        update_slot, in_axes=(0, axes, axes, 0, own_axes), out_axes=(axes, 0, own_axes)
    )
    turns = Turns(jnp.asarray(turns.serials), jnp.asarray(turns.rates))
    result: tuple[dict[str, Array], Array, PyTree] = mapped(turns, gradients, weights, *state)
    return result


def _select(which: Array | np.ndarray | bool, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)
