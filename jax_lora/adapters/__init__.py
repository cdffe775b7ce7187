"""LoRA adapters on the host: what one is, and reading and writing the files of Hugging Face PEFT.

`read_foreign` reads those of other projects, to be saved as PEFT's.

Needs no device, no JAX and no torch. Everything read here may come from a stranger: nothing is
unpickled, sizes are checked before anything is allocated, and a PEFT feature is either exact or
refused by its name.
"""

from jax_lora.adapters.files import read_json as read_json
from jax_lora.adapters.files import read_safetensors as read_safetensors
from jax_lora.adapters.files import refuse_pointer as refuse_pointer
from jax_lora.adapters.foreign import from_qwix as from_qwix
from jax_lora.adapters.foreign import is_foreign as is_foreign
from jax_lora.adapters.foreign import read_foreign as read_foreign
from jax_lora.adapters.limits import UploadLimits as UploadLimits
from jax_lora.adapters.names import Rename as Rename
from jax_lora.adapters.names import meant as meant
from jax_lora.adapters.names import renamed as renamed
from jax_lora.adapters.peft import load_peft as load_peft
from jax_lora.adapters.peft import peft_header as peft_header
from jax_lora.adapters.peft import peft_modules as peft_modules
from jax_lora.adapters.peft import save_peft as save_peft
from jax_lora.adapters.types import MAX_RANK as MAX_RANK
from jax_lora.adapters.types import Adapter as Adapter
from jax_lora.adapters.types import AdapterHeader as AdapterHeader
from jax_lora.adapters.types import FullModule as FullModule
from jax_lora.adapters.types import FullShape as FullShape
from jax_lora.adapters.types import LoRAConfig as LoRAConfig
from jax_lora.adapters.types import LoRAShape as LoRAShape
from jax_lora.adapters.types import LoRAWeights as LoRAWeights
from jax_lora.adapters.types import TrainedTokens as TrainedTokens
from jax_lora.adapters.types import finite_number as finite_number
