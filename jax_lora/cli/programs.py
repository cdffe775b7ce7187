"""Where compiled programs are kept between two starts of the command line."""

import os
from pathlib import Path

_MAX_BYTES = 2 << 30


def place_of_programs() -> Path | None:
    """The folder in which `generate` keeps compiled programs; None where the user wants none kept.

    It is the one that the user has told JAX, or else `jax-lora/programs` in `$XDG_CACHE_HOME` or in
    `~/.cache`.
    """
    import jax  # `--help` need not wait for it

    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jax-lora" / "programs"


def keep_programs() -> Path | None:
    """Has JAX keep what it compiles on the disk, unless the user has said where, or not to.

    The programs that were not used for longest go first, beyond 2 GB. Returns the place; None where
    this changed nothing.
    """
    import jax

    place = place_of_programs()
    if place is None or jax.config.jax_compilation_cache_dir:
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return place
