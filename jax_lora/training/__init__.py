"""Training of adapters that come and go: an optimizer's state belongs to an adapter, not a slot."""

from jax_lora.bank.trainees import Trainees as Trainees
from jax_lora.training.optimizer import PerAdapterState as PerAdapterState
from jax_lora.training.optimizer import per_adapter as per_adapter
from jax_lora.training.state import load_state as load_state
from jax_lora.training.state import save_state as save_state
