"""Amounts of memory written in text: ``2.50 GiB``, ``18.2GB``, ``512 MB``, ``8589934592 bytes``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

FACTORS: dict[str, int] = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtpe", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtpe", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgtpe", 1)},
}
"""Bytes in a unit, in lower case. GB is 10^9 and GiB 2^30; a bare G is what tools like `top` and
`htop` mean by it, 2^30."""
NUMBER = r"\d[\d,]{0,20}(?:\.\d{0,20})?(?:[eE][+-]?\d+)?"
UNIT = r"(?:[KMGTPE]i?B|[kmgtpe]i?b|[KMGTPE]|bytes?|B)"
QUANTITY = rf"(?P<number>{NUMBER})\s*(?P<unit>{UNIT})(?!\w|/\s*s)"
_FOUND = re.compile(rf"(?<![\w.]){QUANTITY}")


@dataclass(frozen=True)
class Quantity:
    """An amount found in a text, with the place where it stands."""

    count_bytes: int
    start: int
    end: int


def quantities(text: str) -> Iterator[Quantity]:
    """Yield every amount of memory in `text`; rates such as ``12 MB/s`` are none."""
    for found in _FOUND.finditer(text):
        yield Quantity(to_bytes(found["number"], found["unit"]), found.start(), found.end())


def to_bytes(number: str, unit: str = "", binary: bool = False) -> int:
    """Return the bytes that a number with a unit stands for.

    Args:
        number: as written, ``1,024`` and ``2.5e3`` included.
        unit: a key of `FACTORS`, in any case.
        binary: the writer means 2^30 by GB, as torch's MPS allocator did before it wrote GiB.

    """
    unit = unit.lower()
    if binary and len(unit) == 2 and unit.endswith("b"):
        unit = unit[0]
    return round(float(number.replace(",", "")) * FACTORS[unit])
