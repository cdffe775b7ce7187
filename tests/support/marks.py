"""Which values of a test's parameters run where: in the quick tests, in CI, or on request."""

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def in_ci(*values: Any) -> ParameterSet:
    """Left to CI: the quick tests run other values."""
    return pytest.param(*values, marks=pytest.mark.ci)


def on_request(*values: Any) -> ParameterSet:
    """Left to the long form of the tests: CI runs values that cover what this one does."""
    return pytest.param(*values, marks=pytest.mark.slow)


# For layers and banks: `test_ops.py` compares both phases of each op.
PHASES = ["decode", in_ci("prefill")]


def spread(first: Iterable, second: Iterable) -> list[ParameterSet]:
    """All pairs of values. Those that bring no value for the first time are the test's long form.

    A value may be a tuple, for several parameters. `first` is at least as long as `second`.
    """
    found, values = [], list(second)
    for n, one in enumerate(first):
        for m, other in enumerate(values):
            both = [
                v for value in (one, other) for v in (value if type(value) is tuple else [value])
            ]
            marks = [] if m == n % len(values) else [pytest.mark.slow]
            found.append(pytest.param(*both, marks=marks))
    return found
