"""Strict numbers for every test: no silent dtype promotion; backends' array shapes are checked."""

import importlib.util
import os

# The command line would keep what it compiles in the home of whoever runs the tests.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

if importlib.util.find_spec("beartype"):  # absent on some GPU machines
    from jaxtyping import install_import_hook

    # Ops and `checks` refuse wrong types themselves, and tests hold what they say. Protocols and
    # Pallas's types, of which the kernels are full, can't be checked at run time.
    CHECKED = ("autodiff", "derivatives", "loop", "mosaic_gpu.backend", "xla")
    install_import_hook([f"pallas_kernels.{name}" for name in CHECKED], "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; all else runs on the first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a GPU: python -m pytest -m gpu on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
