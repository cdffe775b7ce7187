"""Tuned choices: other fields of a `Config` than its heuristic gives, where a GPU measured better.

A table is a JSON file for one kind of GPU. `jax-lora bench --tune` makes one:

    {"device": "NVIDIA H100 80GB HBM3",
     "entries": [{"tokens": 64, "features": 4096, "width": 4096, "rank": 16,   # a ShapeClass
                  "config": {"column_clusters": 2}, "changes_bits": false,
                  "date": ..., "measured": [{"case": ..., "default_us": ..., "us": ...}]}]}

Entries of up to 256 tokens are of the one launch, all others of the two.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Fields that fix the order in which H is summed: other values change bits, of the rest speed alone.
ORDER_FIELDS = frozenset({"split", "warps"})
_PACKAGED = Path(__file__).parent / "tuned"


class ShapeClass(NamedTuple):
    """Shapes that share an entry: those of one bucket with up to so many tokens (a power of 4),
    features H and columns of y (powers of 2)."""

    tokens: int
    features: int
    width: int
    rank: int

    @classmethod
    def of(cls, num_tokens: int, features: int, width: int, rank: int) -> "ShapeClass":
        return cls(_power(4, num_tokens), _power(2, features), _power(2, width), rank)


def _power(base: int, at_least: int) -> int:
    power = 1
    while power < at_least:
        power *= base
    return power


def table_path() -> Path | None:
    """The table in force: the file that JAX_LORA_TUNING names ("" or "none": no table), else the
    one that comes with this package for the default device. Looked up at each trace."""
    named = os.environ.get("JAX_LORA_TUNING")
    if named is not None:
        return None if named in ("", "none") else Path(named)
    device = jax.local_devices()[0]
    path = _PACKAGED / f"{device.device_kind.replace(' ', '_')}.json"
    return path if device.platform == "gpu" and path.is_file() else None


def tuned_fields(shape: ShapeClass, config: Callable[..., object]) -> Mapping[str, Any]:
    """What the table in force changes for `shape`; nothing where there is none.

    Raises:
      FileNotFoundError, ValueError: as `read` does.
    """
    path = table_path()
    return {} if path is None else _read_once(path, config).get(shape, {})


def read(path: Path, config: Callable[..., object]) -> Mapping[ShapeClass, Mapping[str, Any]]:
    """The changed fields by class of shapes. `config(**fields)` must raise for impossible ones.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no tuning table, or an entry is impossible or not marked as it must.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no tuning table {path}") from None
    table: dict[ShapeClass, Mapping[str, Any]] = {}
    try:
        for entry in json.loads(text)["entries"]:
            shape = ShapeClass(*(entry[name] for name in ShapeClass._fields))
            if ShapeClass.of(*shape) != shape or shape in table:
                raise ValueError(f"{shape} is no class of shapes, or not its only entry")
            fields = entry["config"]
            if not all(value is None or type(value) is int for value in fields.values()):
                raise ValueError(f"{fields} must be integers")
            config(**fields)
            if entry["changes_bits"] is not (not ORDER_FIELDS.isdisjoint(fields)):
                raise ValueError(
                    f"changes_bits must be true where {' or '.join(sorted(ORDER_FIELDS))} changes, "
                    f"else false, got {entry['changes_bits']!r} with {fields}"
                )
            table[shape] = fields
    except KeyError as missing:
        raise ValueError(f"{path} is no tuning table: {missing} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tuning table: {error}") from None
    return table


_read_once = functools.cache(read)
