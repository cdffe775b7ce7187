"""The public names of `jax_lora`, which imports them when one is used."""

from jax_lora.adapters import Adapter as Adapter
from jax_lora.adapters import FullModule as FullModule
from jax_lora.adapters import LoRAConfig as LoRAConfig
from jax_lora.adapters import LoRAWeights as LoRAWeights
from jax_lora.adapters import TrainedTokens as TrainedTokens
from jax_lora.adapters import load_peft as load_peft
from jax_lora.adapters import save_peft as save_peft
from jax_lora.bank import AdapterBank as AdapterBank
from jax_lora.bank import BankFullError as BankFullError
from jax_lora.batch import AdapterBatch as AdapterBatch
from jax_lora.batch import use as use
from jax_lora.nn.apply import apply_lora as apply_lora
from jax_lora.nn.apply import left_alone as left_alone
from jax_lora.nn.einsum import LoRAEinsum as LoRAEinsum
from jax_lora.nn.embed import LoRAEmbed as LoRAEmbed
from jax_lora.nn.embed import tie_head as tie_head
from jax_lora.nn.linear import LoRADense as LoRADense
from jax_lora.nn.linear import LoRADenseGeneral as LoRADenseGeneral
from jax_lora.nn.packed import call_packed as call_packed
from jax_lora.nn.scan import scan_layers as scan_layers
from jax_lora.nn.stacks import LoRAScale as LoRAScale
from jax_lora.plan import plan_slots as plan_slots
from jax_lora.serving.options import step_options as step_options
