"""Times the kernels, whole steps and PyTorch calls: `python -m benchmarks` in the repository."""
