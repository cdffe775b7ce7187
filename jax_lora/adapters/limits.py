"""What is taken from whoever uploads adapters, in one place."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jax_lora.adapters.names import Rename
from jax_lora.adapters.peft import load_peft, peft_header
from jax_lora.adapters.types import Adapter, AdapterHeader, finite_number
from jax_lora.messages import printable, shown


@dataclasses.dataclass(frozen=True)
class UploadLimits:
    """What an adapter may be. All but `max_seconds` and NaN is checked by headers alone.

    Example::

        limits = UploadLimits(max_bytes=200 << 20, max_seconds=30)
        header = limits.header("uploads/french")  # reads no weights
        adapter = limits.read("uploads/french")

    Whatever the limits, sizes are checked before anything is allocated, nothing is unpickled, and
    patterns take bounded time.

    Args:
      max_bytes: of weights; None for any number.
      max_modules: that it adapts or has whole; None for any number.
      max_seconds: for reading weights, looked at between tensors; None for any time.
      allow_links, allow_nonfinite: as in `load_peft`.

    Raises:
      TypeError, ValueError: a limit is malformed.
    """

    max_bytes: int | None = None
    max_modules: int | None = None
    max_seconds: float | None = None
    allow_links: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_modules"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.max_seconds is not None and finite_number(self.max_seconds, "max_seconds") <= 0:
            raise ValueError(f"max_seconds must be above 0, got {self.max_seconds}")

    def check(self, header: AdapterHeader, what: str = "it") -> None:
        """ValueError where an adapter, `what` in the message, is too large."""
        if self.max_bytes is not None and header.nbytes > self.max_bytes:
            raise ValueError(
                f"{what} has {header.nbytes} bytes of weights; max_bytes={self.max_bytes}"
            )
        count = len({*header.modules, *header.full, *header.tokens})
        if self.max_modules is not None and count > self.max_modules:
            raise ValueError(f"{what} has {count} modules; max_modules={self.max_modules}")

    def header(
        self, path: str | os.PathLike[str], *, rename: Rename | None = None
    ) -> AdapterHeader:
        """What a PEFT folder has, by its config and the headers of its files alone.

        Raises:
          FileNotFoundError, ValueError: as `read`, but for what only weights can tell.
        """
        header = peft_header(path, allow_links=self.allow_links, rename=rename)
        self.check(header, printable(path))
        return header

    def read(
        self,
        path: str | os.PathLike[str],
        *,
        check: Callable[[AdapterHeader], object] | None = None,
        base_weight: Callable[[str], np.ndarray] | None = None,
        rename: Rename | None = None,
    ) -> Adapter:
        """`load_peft` within the limits. Its arguments and errors are those of `load_peft`.

        Raises:
          ValueError: the adapter exceeds a limit, too; the message has both numbers.
        """

        def check_both(header: AdapterHeader) -> None:
            self.check(header, printable(path))
            if check is not None:
                check(header)

        return load_peft(
            Path(path),
            check=check_both,
            base_weight=base_weight,
            rename=rename,
            allow_links=self.allow_links,
            allow_nonfinite=self.allow_nonfinite,
            max_seconds=self.max_seconds,
        )


def check_count(name: str, value: object) -> None:
    """An error unless the value is a number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a number at least 0, got {shown(value)}")
