"""Strict numbers for every test: no silent dtype promotion; backends' array shapes are checked."""

import importlib.util

if importlib.util.find_spec("beartype"):  # absent on some GPU machines
    from jaxtyping import install_import_hook

    install_import_hook(["pallas_kernels.xla", "pallas_kernels.loop"], "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a GPU: python -m pytest -m gpu on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
