"""NNX layers that hold stacks of LoRA adapters beside their kernel, and `apply_lora`."""

from jax_lora.nn.apply import apply_lora as apply_lora
from jax_lora.nn.einsum import LoRAEinsum as LoRAEinsum
from jax_lora.nn.embed import LoRAEmbed as LoRAEmbed
from jax_lora.nn.embed import tie_head as tie_head
from jax_lora.nn.experts import Experts as Experts
from jax_lora.nn.experts import LoRAExperts as LoRAExperts
from jax_lora.nn.experts import call_experts as call_experts
from jax_lora.nn.experts import pairs_of as pairs_of
from jax_lora.nn.layer import LoRALayer as LoRALayer
from jax_lora.nn.linear import LoRADense as LoRADense
from jax_lora.nn.linear import LoRADenseGeneral as LoRADenseGeneral
from jax_lora.nn.packed import call_packed as call_packed
from jax_lora.nn.scan import scan_layers as scan_layers
from jax_lora.nn.stacks import LoRAScale as LoRAScale
