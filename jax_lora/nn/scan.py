"""`scan_layers`: like layers, stacked in one module, compiled once and run one after the other."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jax_lora.batch import AdapterBatch, current, use
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.names import array_of, path_name
from jax_lora.nn.stacks import InPlace, LoRAStack
from jax_lora.sharding import tokens_of


def scan_layers[M: nnx.Module, C, X, Y](
    body: Callable[[M, C, X | None], tuple[C, Y]], layers: M, carry: C, xs: X | None = None
) -> tuple[C, Y]:
    """`jax.lax.scan` over layers that are stacked in one module.

        for n in range(N):
            carry, ys[n] = body(layers[n], carry, xs[n])

    Layers are stacked by `nnx.vmap` of what makes one, which gives each array an axis of layers in
    front. In a plain `nnx.scan` or `jax.lax.scan` they compute the same. There a GPU reads the
    stacks of adapters in place too: XLA passes a layer's slice by its address. Only a turn in
    `jax.checkpoint` (`nnx.remat`) copies them, unless it has `prevent_cse=False`, which a scan
    allows. Here each layer reads them where they stand, whatever XLA does.

    Example::

        @nnx.vmap
        def make(rngs):
            return Block(rngs)

        layers = make(nnx.Rngs(0).split(12))
        x, _ = scan_layers(lambda block, x, _: (block(x), None), layers, x)

    Args:
      body: `(layer, carry, x) -> (carry, y)`. What it writes to the layer's variables is lost.
      layers: the module. Layers stacked along several axes take a scan inside of a scan.
      carry: as in `jax.lax.scan`. Where its first array is the layers' x `[..., H]`, the tokens of
        the batch of `jax_lora.use` are sorted before the loop, not in each turn.
      xs: as in `jax.lax.scan`; None for none.

    Returns:
      The last carry, and the ys, stacked.

    Raises:
      ValueError: the arrays of `layers` have no common axis in front.
    """
    graphdef, *(places, state) = nnx.split(layers, InPlace, ...)
    _check_axis(state)
    outer = _lora_layers(layers)

    def turn(
        batch: AdapterBatch | None, before: tuple[Array, C], given: tuple[nnx.State, X | None]
    ) -> tuple[tuple[Array, C], Y]:
        (number, carry), (own, x) = before, given
        layer = nnx.merge(graphdef, places, own)
        _read_in_place(layer, outer, number)
        with use(batch):
            carry, y = body(layer, carry, x)
        return (number + 1, carry), y

    def first_turn(batch: AdapterBatch) -> object:
        first = jax.tree.map(lambda array: array[0], (state, xs))
        return turn(batch, (jnp.int32(0), carry), first)

    batch = _prepared(current(), carry, first_turn)
    # The number is carried: XLA takes the loop's own for it, where it would slice a range of them.
    start = jnp.int32(0), carry
    (_, last), ys = jax.lax.scan(functools.partial(turn, batch), start, (state, xs))
    return last, ys


def _check_axis(state: nnx.State) -> None:
    """ValueError unless all arrays have one axis of layers in front."""
    shapes = {path: jnp.shape(array_of(leaf)) for path, leaf in nnx.to_flat_state(state)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        shown = ", ".join(f"{path_name(p)} {list(s)}" for p, s in list(shapes.items())[:8])
        raise ValueError(
            "all arrays of layers stacked for a scan have one axis of layers in front; these have "
            f"{shown or 'no arrays'}"
        )


def _lora_layers(module: nnx.Module) -> list[LoRALayer]:
    return [layer for _, layer in nnx.iter_modules(module) if isinstance(layer, LoRALayer)]


def _read_in_place(layer: nnx.Module, outer: Sequence[LoRALayer], number: Array) -> None:
    """Tells the LoRA layers of a turn where their adapters stand among those of all layers."""
    numbers: dict[int, InPlace] = {}  # one variable for all: a launch takes one number
    for mine, all_layers in zip(_lora_layers(layer), outer):
        before = None
        if hasattr(all_layers, "in_place"):  # inside of an outer scan, whose layer has a number
            before = all_layers.in_place[1].get_value()
        if id(before) not in numbers:
            own = number if before is None else before * all_layers.lead[0] + number
            numbers[id(before)] = InPlace(own)
        scales = _of_all_layers(all_layers, [all_layers.scales])
        mine.in_place = nnx.List([*scales, numbers[id(before)]])
        for stack, of_all in zip(mine.stacks, all_layers.stacks):
            stack.in_place = nnx.List(_of_all_layers(of_all, of_all.variables))


def _of_all_layers(
    holder: LoRALayer | LoRAStack, variables: Sequence[nnx.Variable[Array]]
) -> list[InPlace]:
    """What `variables` of all layers of the scan hold, and of all turns of outer scans."""
    if hasattr(holder, "in_place"):
        whole = [variable.get_value() for variable, _ in zip(holder.in_place, variables)]
        return [InPlace(array.reshape(-1, *array.shape[2:])) for array in whole]
    # Gradients are those of the slices: through these, each turn would add to all of the stacks.
    return [InPlace(jax.lax.stop_gradient(variable.get_value())) for variable in variables]


def _prepared(
    batch: AdapterBatch | None, carry: object, first_turn: Callable[[AdapterBatch], object]
) -> AdapterBatch | None:
    """The batch with its tokens sorted, and with the tables that kernels read of them."""
    arrays = jax.tree.leaves(carry)
    if batch is None or not arrays or jnp.ndim(arrays[0]) < 2:
        return batch
    lead, tokens = jnp.shape(arrays[0])[:-1], tokens_of(arrays[0])
    try:
        batch = batch.sorted_for(lead, tokens)
    except ValueError:  # it is no x of the batch; a layer may have another
        return batch
    if tokens is None:  # shards of tokens would each need tables of their own
        batch = batch.with_tables(lead, functools.partial(first_turn, batch))
    return batch
