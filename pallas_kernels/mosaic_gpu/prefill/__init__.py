"""Many tokens in two launches: the shrink makes v = scale * x A^T, the expand adds v B^T to y.

`config.py` decides how they cut their work. `route.py` tells a block which adapters its tokens
have. `shrink.py` and `expand.py` are the kernels; each reads top down, from the plan of a launch to
what a block does.
"""

from pallas_kernels.mosaic_gpu.prefill.config import default_config as default_config
from pallas_kernels.mosaic_gpu.prefill.expand import ExpandPart as ExpandPart
from pallas_kernels.mosaic_gpu.prefill.expand import expand_kernel as expand_kernel
from pallas_kernels.mosaic_gpu.prefill.shrink import ShrinkPart as ShrinkPart
from pallas_kernels.mosaic_gpu.prefill.shrink import shrink_kernel as shrink_kernel
