"""The decode kernel: both halves of LoRA, or one, in one launch.

kernel.py shows the life of a token on one screen; each line of it is a file here. What follows from
shapes is in plan.py, work.py and memory.py.
"""

from pallas_kernels.mosaic_gpu.decode.config import MAX_UNSEATED_TOKENS as MAX_UNSEATED_TOKENS
from pallas_kernels.mosaic_gpu.decode.config import decode_config as decode_config
from pallas_kernels.mosaic_gpu.decode.kernel import decode_kernel as decode_kernel
from pallas_kernels.mosaic_gpu.decode.plan import DecodePart as DecodePart
from pallas_kernels.mosaic_gpu.decode.plan import Plan as Plan
from pallas_kernels.mosaic_gpu.decode.plan import plan as plan
from pallas_kernels.mosaic_gpu.decode.seating import Seating as Seating
