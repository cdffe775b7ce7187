"""The ops as layers call them: traced once for all batches."""

from jax_lora.batch import of_any_batch
from pallas_kernels import ops

add_in_step = of_any_batch(ops.add_in_step)
delta_ahead = of_any_batch(ops.delta_ahead)
