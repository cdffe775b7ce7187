"""Pallas:Mosaic GPU kernels for Hopper (sm_90): the backend "mosaic_gpu"."""

from pallas_kernels.mosaic_gpu.config import Config as Config
