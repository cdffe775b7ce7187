"""An optimizer's state of one adapter, to a file and back."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jax_lora.bank import AdapterBank
from jax_lora.messages import printable, shown
from jax_lora.training.optimizer import PerAdapterState
from jax_lora.training.stacks import without_axis


def save_state(state: PyTree, bank: AdapterBank, name: str, path: str | os.PathLike[str]) -> None:
    """Writes the optimizer's state of one adapter to a safetensors file, which `load_state` reads.

    Example::

        bank.save("french", "checkpoint")
        save_state(state, bank, "french", "checkpoint/optimizer.safetensors")

    A checkpoint of the whole state alone is no substitute: which adapter a slot's state belongs to
    is known in one process, and to the bank's own checkpoint (`AdapterBank.save_checkpoint`).

    Args:
      state: of `per_adapter`, or a tree with one in it, such as `nnx.Optimizer.opt_state`.
      path: of the file; one that is there is replaced, whole or not at all.

    Raises:
      KeyError: the adapter is not loaded.
      ValueError: `state` holds none, or several, of `per_adapter`; or no step has trained the
        adapter since it was loaded.
    """
    leaves = jax.tree.leaves(state)
    own = _own(state, bank, name)
    if int(leaves[own.serials][own.slot]) != own.serial:
        raise ValueError(
            f"the state has nothing of adapter {shown(name)}: no step has trained it since it was "
            "loaded"
        )
    arrays = _read([leaves[nth] for nth in own.arrays.values()], np.int32(own.slot), own.axes)
    tensors = {key: np.asarray(array) for key, array in zip(own.arrays, arrays)}
    file = Path(path)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=file.parent) as folder:
        save_file(tensors, Path(folder, "state"))
        os.replace(Path(folder, "state"), file)


def load_state(state: PyTree, bank: AdapterBank, name: str, path: str | os.PathLike[str]) -> PyTree:
    """`state` with an adapter's own as it was saved. Training goes on as if it had never stopped.

    Example::

        bank.load("french", "checkpoint")
        state = load_state(state, bank, "french", "checkpoint/optimizer.safetensors")

    The adapter may have another slot now, and the model other slots and buckets beside its own. The
    first call compiles a small program.

    Args:
      state: as in `save_state`, of the same transformation. Its arrays are donated, as by a step.

    Returns:
      A tree like `state`. `nnx.Optimizer` takes it as `optimizer.opt_state = ...`.

    Raises:
      KeyError: the adapter is not loaded.
      FileNotFoundError: there is no file.
      ValueError: it is none of `save_state`, or of another transformation, model or rank bucket;
        or as in `save_state`. Nothing is donated then.
    """
    leaves, treedef = jax.tree.flatten(state)
    own = _own(state, bank, name)
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{printable(path)} is no state of an adapter: {printable(str(error))}"
        ) from None
    _check(path, {key: leaves[nth] for key, nth in own.arrays.items()}, own.axes, saved)
    places = [own.serials, *own.arrays.values()]
    new = [np.int32(own.serial), *(saved[key] for key in own.arrays)]
    written = _write([leaves[nth] for nth in places], np.int32(own.slot), new, (0, *own.axes))
    for nth, array in zip(places, written):
        leaves[nth] = array
    return jax.tree.unflatten(treedef, leaves)


class _Own(NamedTuple):
    """What an adapter has in a state.

    Attributes:
      slot, serial: of the adapter.
      serials: which leaf of the state holds the serials of the adapter's bucket.
      arrays: which leaves have a slot of its own, by what they are called in a file.
      axes: of the slots, of each of these.
    """

    slot: int
    serial: int
    serials: int
    arrays: dict[str, int]
    axes: tuple[int, ...]


def _own(state: PyTree, bank: AdapterBank, name: str) -> _Own:
    leaves, treedef = jax.tree.flatten(nnx.as_pure(state))
    numbered = jax.tree.unflatten(treedef, range(len(leaves)))
    nodes = jax.tree.leaves(numbered, is_leaf=lambda node: isinstance(node, PerAdapterState))
    found = [node for node in nodes if isinstance(node, PerAdapterState)]
    if len(found) != 1:
        raise ValueError(f"the state must hold one state of per_adapter, got {len(found)}")
    turns = bank.trainees([name]).by_bucket
    (bucket,) = (bucket for bucket, own in turns.items() if np.any(own.serials))
    if set(found[0].inner) != set(turns):
        raise ValueError(
            f"the state is of a model with buckets {sorted(found[0].inner)}, but the bank's has "
            f"{sorted(turns)}"
        )
    slot = int(np.argmax(turns[bucket].serials))
    arrays = jax.tree_util.tree_leaves_with_path(found[0].inner[bucket])
    return _Own(
        slot,
        int(turns[bucket].serials[slot]),
        int(found[0].serials[bucket]),
        {jax.tree_util.keystr(path): nth for path, nth in arrays},
        found[0].slot_axes[sorted(turns).index(bucket)],
    )


def _check(
    path: str | os.PathLike[str],
    arrays: dict[str, Array],
    axes: tuple[int, ...],
    saved: dict[str, np.ndarray],
) -> None:
    """ValueError unless what was saved are slots of these arrays."""
    mine = {
        key: (without_axis(array.shape, axis), array.dtype)
        for (key, array), axis in zip(arrays.items(), axes)
    }
    theirs = {key: (array.shape, array.dtype) for key, array in saved.items()}
    if keys := sorted(set(mine) ^ set(theirs)):
        holder = "file" if keys[0] in theirs else "state"
        raise ValueError(
            f"{printable(path)} is of another transformation or model: only the {holder} has "
            f"{shown(keys[0], 200)}"
        )
    for key, (shape, dtype) in mine.items():
        if theirs[key] != (shape, dtype):
            other_shape, other = theirs[key]
            raise ValueError(
                f"{printable(path)} is of another rank bucket or dtype: its {shown(key, 200)} is "
                f"{other} {list(other_shape)}, that of the state is {dtype} {list(shape)}"
            )


@jax.jit(static_argnums=2)
def _read(arrays: list[Array], slot: Array, axes: tuple[int, ...]) -> list[Array]:
    return [jnp.take(array, slot, axis) for array, axis in zip(arrays, axes)]


@jax.jit(donate_argnums=0, static_argnums=3)
def _write(
    arrays: list[Array], slot: Array, new: list[Array], axes: tuple[int, ...]
) -> list[Array]:
    return [
        jax.lax.dynamic_update_index_in_dim(array, own, slot, axis % array.ndim)
        for array, own, axis in zip(arrays, new, axes)
    ]
