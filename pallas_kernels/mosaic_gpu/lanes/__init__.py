"""The level below Pallas: what single lanes do. `values` is the interface; two machines have it."""

from pallas_kernels.mosaic_gpu.lanes.emulator import ArrayMemory as ArrayMemory
from pallas_kernels.mosaic_gpu.lanes.emulator import Emulator as Emulator
from pallas_kernels.mosaic_gpu.lanes.emulator import Left as Left
from pallas_kernels.mosaic_gpu.lanes.gpu import Gpu as Gpu
from pallas_kernels.mosaic_gpu.lanes.gpu import MemRef as MemRef
