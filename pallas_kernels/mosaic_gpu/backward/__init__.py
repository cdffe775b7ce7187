"""The gradients in three launches: u = x A^T and dv = dy B; dx = dv A; and A's and B's.

`tiles.py` cuts the tokens of each adapter into tiles, and `rows.py` copies their rows. `squares.py`
is the unit that all kernels copy and multiply. `narrow.py`, `wide.py` and `outer.py` are the
kernels, `config.py` decides how they cut their work, and `gradients.py` joins them.
"""

from pallas_kernels.mosaic_gpu.backward.gradients import GradientPart as GradientPart
from pallas_kernels.mosaic_gpu.backward.gradients import expand_gradients as expand_gradients
from pallas_kernels.mosaic_gpu.backward.gradients import gradients as gradients
from pallas_kernels.mosaic_gpu.backward.gradients import shrink_gradients as shrink_gradients
