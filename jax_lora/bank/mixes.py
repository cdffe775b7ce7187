"""Which adapters the rows of a batch have, and with what weights, as a caller names them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_lora.adapters import finite_number

# What a caller says of a row: an adapter, None, or several adapters, each with its weight.
NamedRow = str | Mapping[str, float] | None


class RowNames(NamedTuple):
    """The adapters of rows that are checked.

    Attributes:
      names: where no row is a mix, the adapter of each row, or None.
      mixes: otherwise, the adapters of each row and their weights.
    """

    names: Sequence[str | None]
    mixes: Sequence[Mapping[str, float]] = ()

    @property
    def distinct(self) -> list[str]:
        """All adapters, in order, each once."""
        every = [name for row in self.mixes for name in row]
        return [name for name in dict.fromkeys((*self.names, *every)) if name is not None]

    def arrays(
        self, ids: Mapping[str, int], adapters_per_row: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows' ids and weights, `[B, K]`; with one adapter per row `[B]` and None."""
        first = np.array([-1 if name is None else ids[name] for name in self.names], np.int32)
        if adapters_per_row == 1:
            return first, None
        size = len(self.mixes) or len(self.names), adapters_per_row
        indices, weights = np.full(size, -1, np.int32), np.zeros(size, np.float32)
        if not self.mixes:
            indices[:, 0], weights[:, 0] = first, first >= 0
        for n, row in enumerate(self.mixes):
            indices[n, : len(row)] = [ids[name] for name in row]
            weights[n, : len(row)] = list(row.values())
        return indices, weights


def row_names(names_per_row: Sequence[NamedRow], adapters_per_row: int) -> RowNames:
    """The adapters of rows, checked.

    Raises:
      TypeError: a row is no name, no mapping from names to numbers, and not None.
      ValueError: a row has more than `adapters_per_row` adapters; a weight is not finite, or, with
        one adapter per row, not 1.
    """
    is_list = isinstance(names_per_row, Sequence) and not isinstance(names_per_row, str)
    if is_list and {str, type(None)}.issuperset(map(type, names_per_row)):
        return RowNames(names_per_row)  # type: ignore[arg-type]
    if not is_list or not all(map(_is_row, names_per_row)):
        raise TypeError(
            "names_per_row must be a list of names, None and {name: weight}, got "
            f"{names_per_row!r:.300}"
        )
    mixes = []
    for n, given in enumerate(names_per_row):
        row = dict(given) if isinstance(given, Mapping) else {} if given is None else {given: 1.0}
        _check_row(n, row, adapters_per_row)
        mixes.append(row)
    if adapters_per_row == 1:
        return RowNames([next(iter(row), None) for row in mixes])
    return RowNames((), mixes)


def _is_row(row: object) -> bool:
    if not isinstance(row, Mapping):
        return row is None or isinstance(row, str)
    return all(isinstance(name, str) and _is_number(weight) for name, weight in row.items())


def _is_number(weight: object) -> bool:
    is_real = isinstance(weight, int | float | np.integer | np.floating)
    return is_real and not isinstance(weight, bool)


def _check_row(n: int, row: Mapping[str, float], adapters_per_row: int) -> None:
    if len(row) > adapters_per_row:
        raise ValueError(
            f"row {n} has {len(row)} adapters, {list(row)!r:.300}, but the bank takes "
            f"{adapters_per_row} per row; make it with AdapterBank(model, "
            f"adapters_per_row={len(row)})"
        )
    for name, weight in row.items():
        finite_number(weight, f"row {n}: the weight of {name!r:.300}")
        if adapters_per_row == 1 and weight != 1:
            raise ValueError(
                f"row {n}: {name!r:.300} has weight {weight}, but the rows of this bank have no "
                "weights; make it with AdapterBank(model, adapters_per_row=2)"
            )
