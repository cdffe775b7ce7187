"""What the LoRA layers share."""

from collections.abc import Sequence
from typing import Any, cast

from flax import nnx
from jaxtyping import Array, DTypeLike

from jax_lora.batch import AdapterBatch, Guard, current
from jax_lora.nn.stacks import (
    LoRAScale,
    LoRAStack,
    Slots,
    empty_scales,
    slots_of,
    stack_dtype,
    stack_part,
    stack_shapes,
)
from jax_lora.process import check_process
from pallas_kernels import LoRAPart
from pallas_kernels.ops import add_in_step


class LoRALayer(nnx.Module):
    """What the LoRA layers share; mixed in before the layer of Flax that each extends.

    A subclass says how its `x` and `y` read as `[T, H]` and `[T, N]` matrices.

    Attributes:
      guard: of the model that it is in; None where neither `apply_lora` nor a bank has seen it.
    """

    guard: Guard | None
    kernel: nnx.Param[Array]
    stacks: nnx.List[LoRAStack]
    scales: LoRAScale
    slices: tuple[int, ...]

    def features(self) -> tuple[int, int]:
        """`(H, N)` of the layer read as a matrix.

        Raises:
          ValueError: it is not a matrix.
        """
        raise NotImplementedError

    def x_matrix(self, x: Array) -> Array:
        """x as `[*lead, H]`, where `lead` are the axes that tokens are made of."""
        raise NotImplementedError

    def y_matrix(self, y: Array) -> Array:
        """y as `[*lead, N]`."""
        return y

    def y_tensor(self, y_matrix: Array, y: Array) -> Array:
        """The inverse of `y_matrix`: `y_matrix` in the shape of y."""
        return y_matrix.reshape(y.shape)

    def kernel_matrix(self) -> Array:
        """The kernel as `[H, N]`."""
        return self.kernel[...].reshape(self.features())

    def kernel_tensor(self, matrix: Array) -> Array:
        """The inverse of `kernel_matrix`: `matrix` in the shape of the kernel."""
        return matrix.reshape(self.kernel.shape)

    def add_stacks(
        self,
        slots: Slots,
        buckets: Sequence[int],
        slices: Sequence[int] | None,
        dtype: DTypeLike,
    ) -> None:
        """Allocates empty stacks, one per bucket and slice."""
        check_process()
        slices = (self.features()[1],) if slices is None else tuple(slices)
        shapes = stack_shapes(self.features(), slots, buckets, slices)
        dtype = stack_dtype(dtype)
        self.slices, self.guard = slices, None
        self.stacks = nnx.List(LoRAStack(shape, dtype) for shape in shapes)
        self.scales = LoRAScale(empty_scales(shapes))

    def parts(self, batch: AdapterBatch) -> list[LoRAPart]:
        """What the stacks add to the output."""
        batch.check_guard(self.guard, type(self).__name__)
        first_slots = batch.first_slots(slots_of(stack.shape for stack in self.stacks))
        scales = self.scales[...]
        return [
            stack_part(
                stack.lora_a[...], stack.lora_b[...], scales, stack.shape, first_slots[stack.bucket]
            )
            for stack in self.stacks
        ]

    def __call__(
        self, x: Array, adapters: AdapterBatch | None = None, *, out_sharding: Any = None
    ) -> Array:
        """The base layer's output, plus each row's adapter.

        Args:
          x: as the base layer takes it.
          adapters: which adapter each row uses; None for the batch of `jax_lora.use`, if any.
          out_sharding: as in the base layer.

        Raises:
          TypeError: `adapters` is no AdapterBatch.
          ValueError: it is of another bank, or does not fit the layer's buckets or the rows of x.
        """
        adapters = batch_for(self, adapters)
        base = cast(Any, super())
        y = base.__call__(x, out_sharding=out_sharding)
        return y if adapters is None else self._add_lora(y, x, adapters)

    def _add_lora(self, y: Array, x: Array, adapters: AdapterBatch) -> Array:
        (x,) = cast(Any, self).promote_dtype((x,), dtype=y.dtype)
        in_features, out_features = self.features()
        x = self.x_matrix(x)
        y_matrix = self.y_matrix(y)
        [out] = add_in_step(
            (y_matrix.reshape(-1, out_features),),
            x.reshape(-1, in_features),
            self.parts(adapters),
            adapters.segments(x.shape[:-1]),
            phase=adapters.phase,
        )
        return self.y_tensor(out.reshape(y_matrix.shape), y)


def batch_for(layer: Any, adapters: Any) -> AdapterBatch | None:
    """The batch that a layer was called with, or the ambient one."""
    check_process()
    if not isinstance(adapters, AdapterBatch | None):
        raise TypeError(
            f"{type(layer).__name__} takes an AdapterBatch as its second argument, got "
            f"{type(adapters).__name__}; other arguments go by keyword"
        )
    return current() if adapters is None else adapters


def path_name(path: Sequence[Any]) -> str:
    """An NNX path as PEFT names modules: joined by dots."""
    return ".".join(map(str, path))
