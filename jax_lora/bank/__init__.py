"""The host's side of a model with LoRA layers: names, slots, pins, leases and the LRU order."""

from jax_lora.bank.bank import AdapterBank as AdapterBank
from jax_lora.bank.owner import guard_of as guard_of
from jax_lora.bank.slots import BankEvent as BankEvent
from jax_lora.bank.slots import BankFullError as BankFullError
from jax_lora.bank.slots import BucketUsage as BucketUsage
from jax_lora.bank.writer import PreparedAdapter as PreparedAdapter
