"""Strict numbers for every test: no silent dtype promotion; backends' array shapes are checked."""

import contextlib
import gc
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# The command line would keep what it compiles in the home of whoever runs the tests.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

if importlib.util.find_spec("beartype"):  # absent on some GPU machines
    from jaxtyping import install_import_hook

    # Ops and `checks` refuse wrong types themselves, and tests hold what they say. Protocols and
    # Pallas's types, of which the kernels are full, can't be checked at run time.
    CHECKED = ("autodiff", "derivatives", "loop", "mosaic_gpu.backend", "xla")
    install_import_hook([f"pallas_kernels.{name}" for name in CHECKED], "beartype.beartype")

# Before `gc.freeze`: its import looks for what refers to trio's random numbers, and fails where all
# of that is frozen.
import hypothesis  # noqa: F401
import jax
import pytest
from jax._src.lru_cache import LRUCache
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; all else runs on the first


@pytest.fixture
def optimised() -> Iterator[None]:
    """For tests that ask for equal bits of two programs: these multiply alike if XLA optimises."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


# Linux lets a process map 65,530 areas of memory. XLA maps some for each program that it compiles
# for a CPU, and is killed where it gets no more.
_MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Drops compiled programs behind a module, where there are very many."""
    yield
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        if sum(1 for _ in maps) > _MOST_MAPS:
            gc.collect()
            jax.clear_caches()


def pytest_collection_finish() -> None:
    """Takes what imports made out of the garbage collector's walks: a sixth of the tests' time."""
    gc.collect()
    gc.freeze()


_MOST_BYTES = 2**29


def pytest_configure(config: pytest.Config) -> None:
    """Empties a full folder of programs before workers start, as keys of old code stay in it."""
    if not hasattr(config, "workerinput") and (folder := _programs(config)):
        files = list(folder.iterdir())
        if sum(file.stat().st_size for file in files) > _MOST_BYTES:
            for file in files:
                file.unlink(missing_ok=True)


def _programs(config: pytest.Config) -> Path | None:
    return config.cache.mkdir("programs") if hasattr(config, "cache") else None


def _put_whole(cache: LRUCache, key: str, program: bytes) -> None:
    """As JAX's `put`, but a worker that reads meanwhile never finds half of a program."""
    part = cache.path / f"{key}.{os.getpid()}.{threading.get_ident()}"
    part.write_bytes(program)
    part.replace(cache.path / f"{key}-cache")


def _share_programs(folder: Path) -> None:
    """Keeps what XLA compiles for all tests, workers and runs: many ask for the same programs.

    Compiling takes nearly half of the tests' time. JAX finds a program by its text, the options of
    its compilation, jaxlib and the machine, and still reports it as compiled where it was found.
    """
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    LRUCache.put = _put_whole  # type: ignore[method-assign]
    compilation_cache.reset_cache()  # imports of tests may have asked for it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    # Compiling takes longer here than what is compiled.
    jax.config.update("jax_disable_most_optimizations", True)
    if folder := _programs(config):
        _share_programs(folder)
    skip = pytest.mark.skip(reason="needs a GPU: python -m pytest -m gpu on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
