"""The option `--reserve`: slots that a server keeps for a tenant.

Apart from what uses it, as `jax-lora --help` need not wait for JAX.
"""

import re
from typing import NamedTuple, Self

from jax_lora.messages import shown

_FORM = re.compile(r"(.+)=([1-9][0-9]{0,5})(?::([1-9][0-9]{0,5}))?", re.DOTALL)


class Reserve(NamedTuple):
    """What one `--reserve` asks for.

    Attributes:
      prefix: of the names of the tenant's adapters.
      slots: how many of a rank bucket.
      rank: of the bucket that holds it; None for so many slots of each bucket.
    """

    prefix: str
    slots: int
    rank: int | None = None

    @classmethod
    def parsed(cls, option: str) -> Self:
        """What `PREFIX=SLOTS` or `PREFIX=SLOTS:RANK` asks for.

        Raises:
          ValueError: the option has another form.
        """
        if not (found := _FORM.fullmatch(option)):
            raise ValueError(
                "--reserve takes PREFIX=SLOTS or PREFIX=SLOTS:RANK, such as acme-=2 or "
                f"acme-=2:16, got {shown(option)}"
            )
        prefix, slots, rank = found.groups()
        return cls(prefix, int(slots), None if rank is None else int(rank))
