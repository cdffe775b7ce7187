"""The files of a bank's checkpoint, by Orbax: each process writes and reads its shards."""

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import PyTree

from jax_lora.adapters.files import JsonObject
from jax_lora.bank.agreement import Agreement

if TYPE_CHECKING:  # to import it takes seconds
    import orbax.checkpoint as ocp


def on_host(arrays: PyTree) -> PyTree:
    """NumPy's arrays in the place of those that this process has whole."""
    leaves, tree = jax.tree.flatten(arrays)
    is_own = [leaf.is_fully_addressable for leaf in leaves]
    own = iter(jax.device_get([leaf for leaf, here in zip(leaves, is_own) if here]))
    return jax.tree.unflatten(
        tree, [next(own) if here else leaf for leaf, here in zip(leaves, is_own)]
    )


def write_files(folder: Path, said: JsonObject, arrays: PyTree, agreement: Agreement) -> None:
    """Writes a checkpoint, in all processes that have the bank; process 0 must be one of them.

    Each writes its shards; what is no array of several processes is written by process 0. They wait
    for each other through JAX's coordination service, not through the devices.
    """
    import orbax.checkpoint as ocp

    processes = ocp.options.MultiprocessingOptions(
        active_processes=set(agreement.processes), barrier_sync_key_prefix=agreement.name
    )
    options = ocp.CompositeOptions(
        multiprocessing_options=processes,
        # Else processes count saves to find each other, and other banks' saves would count too.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    parts = ocp.args.Composite(adapters=ocp.args.PyTreeSave(arrays), bank=ocp.args.JsonSave(said))
    with ocp.Checkpointer(handler, multiprocessing_options=processes) as orbax:
        orbax.save(folder, args=parts)


def read_said(folder: Path) -> JsonObject:
    """What `write_files` wrote beside the arrays."""
    import orbax.checkpoint as ocp

    return _read(folder, ocp.args.Composite(bank=ocp.args.JsonRestore()))["bank"]


def read_arrays(folder: Path, shapes: PyTree) -> PyTree:
    """Arrays in the structure of `shapes`: NumPy's, and of those that several processes are to have
    this one's shards."""
    import orbax.checkpoint as ocp

    def how(shape: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if shape.sharding is None or shape.sharding.is_fully_addressable:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=shape.sharding)

    args = ocp.args.PyTreeRestore(shapes, restore_args=jax.tree.map(how, shapes))
    return _read(folder, ocp.args.Composite(adapters=args))["adapters"]


def _read(folder: Path, parts: "ocp.args.Composite") -> "ocp.args.Composite":
    import orbax.checkpoint as ocp

    # Each process by itself: Orbax has them wait for each other, also for one that has failed.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
        return orbax.restore(folder, args=parts)
