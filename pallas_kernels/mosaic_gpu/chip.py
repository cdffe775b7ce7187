"""The chip that the kernels are written for, NVIDIA's H100. Its figures stand here alone."""

CAPABILITY = "9.0"  # CUDA's number for Hopper; no other architecture has wgmma
MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024  # shared memory that a block may have
# What arrays may fill of it, in whole KiB. The last KiB holds the barriers.
ARRAY_BYTES = SHARED_BYTES - 1024
# Rows that wgmma multiplies at once. So a tile has 64 tokens.
TILE = 64
# Columns that wgmma multiplies a tile with at once, at most. Two tiles share half as many: the
# float32 sums of both would be all registers of a thread.
MAX_COLUMNS = 256
# Blocks along an axis of a grid, at most, but for the last axis, which has room for all.
MOST_BLOCKS = 65535
