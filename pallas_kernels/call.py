"""What is static about a call, and what each backend does with it: the seam between the two."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, DTypeLike

from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.routing import AnyIds, TokenIds
from pallas_kernels.stacks import LoRAPart


class Call(NamedTuple):
    """What is static about a call.

    Attributes:
      op: its public name, for errors.
      implementation: the backend's name; "auto" where the platform decides at lowering.
      kernels: "bgmv" or "sgmv" of each part, which choose among XLA's forms.
      y_offset: first column of y that an expand changes.
      add_inputs: whether an expand adds to y.
      widths, dtype: of what `lora_delta` makes.
      config: how the Mosaic kernels cut their work, if the caller says so.
      compact: slots of which gradients are made, of those in use; None for all slots.
      unmasked: whether `lora_delta` of one adapter per token may hold anything where nothing is
        added. The caller masks it, together with what else it does to the ys.
      exact: whether `lora_delta` has the same bits in calls of any size; see `exact.in_chunks`.
      few: whether `add_lora` by "auto" is "xla" on each platform; see `dispatch.prefers_xla`.
    """

    op: str
    implementation: str
    kernels: tuple[str, ...]
    y_offset: int = 0
    add_inputs: bool = True
    widths: tuple[int, ...] = ()
    dtype: DTypeLike | None = None
    config: Config | None = None
    compact: int | None = None
    unmasked: bool = False
    exact: bool = False
    few: bool = False


@runtime_checkable
class Backend(Protocol):
    """One way to compute the ops; a module with these functions.

    Operands are checked: floats of the right shapes, and scales that are float32 arrays. A shrink
    and an expand have local ids. Parts of `add_lora` have ranges that are equal or disjoint.
    """

    def shrink(
        self,
        call: Call,
        v: Array | None,
        x: Array,
        lora_a: Array,
        token_ids: TokenIds,
        scale: Array,
    ) -> Array:
        """v[t] + scale * x[t] @ lora_a[i].T, rounded once; rows of -1 keep v. None is zeros."""

    def expand(self, call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array) -> Array:
        """y[t, columns] (+)= v[t] @ lora_b[i].T, rounded once; rows of -1 keep y."""

    def add_lora(
        self,
        call: Call,
        ys: tuple[Array, ...],
        x: Array,
        parts: tuple[LoRAPart, ...],
        ids: AnyIds,
    ) -> tuple[Array, ...]:
        """The ys plus both halves of every part, over the columns of the ys side by side."""

    def lora_delta(
        self, call: Call, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
    ) -> tuple[Array, ...]:
        """What `add_lora` adds, of `call.widths` and `call.dtype`; -0.0 where nothing is added."""

    def shrink_grad(
        self, call: Call, dv: Array, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients in x, lora_a and scale; `dv` is that of v, float32."""

    def expand_grad(
        self, call: Call, dy: Array, v: Array, lora_b: Array, token_ids: TokenIds
    ) -> tuple[Array, Array, Array]:
        """Gradients in v, lora_b and y."""

    def add_lora_grad(
        self, call: Call, dy: Array, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
    ) -> tuple[Array, tuple[LoRAPart, ...], Array | None]:
        """Gradients in x, in the parts, and, of a mix, in its weights; `dy` is that of all columns
        side by side. Stacks and scales hold the slots of `slots_in_use` alone if `call.compact`
        says how many; then there is no mix."""
