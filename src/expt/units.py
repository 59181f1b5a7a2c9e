"""Bytes inside, GiB at the edges: the only place where the two are converted."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping

GIB = 1024**3
MIB = 1024**2
KIB = 1024
CONTEXT_BYTES = 128 * MIB
"""Of a card's memory as CUDA tells it, what a context takes: what the allocator cannot have."""
FACTORS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
}
"""Bytes in a unit, in lower case: GiB is 2^30 and GB is 10^9."""
WRITTEN_FACTORS = {
    **FACTORS,
    "byte": 1,
    "bytes": 1,
    **{f"{letter}i": 1024**power for power, letter in enumerate("kmgtp", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
}
"""The same for text that others wrote: a bare G is what `top` and `htop` mean by it, 2^30."""
WRITTEN_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,20})(?:\.\d{0,20})?(?:[eE][+-]?\d{1,3})?"
WRITTEN_UNIT = r"(?:[KMGTPkmgtp][iI]?[Bb]|[KMGTP]i|[KMGT]|[Bb]ytes?|B)"
BYTES_FORMS = "200MiB, 6GiB, 6GB (10^9) or a number of bytes"
_PERCENT = re.compile(r"(?P<number>[+-]?\d+(?:\.\d*)?)\s*%")
_BYTES = re.compile(r"\+?(?P<number>\d+(?:\.\d*)?(?:e\+?\d+)?)\s*(?P<unit>[a-z]*)", re.IGNORECASE)


def spell_bytes(count: int) -> str:
    """Return a number of bytes as a setting that stands for exactly so many: ``1GiB``, ``1000``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def parse_bytes(value: object) -> int:
    """Return the bytes that a setting stands for: ``200MiB``, ``6GB``, ``1.5 GiB``, ``1048576``.

    Raises:
        ValueError: why it stands for none, without the name of the setting.

    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is not an amount of memory; write {BYTES_FORMS}")
    found = _BYTES.fullmatch(str(value).strip())
    if found is None:
        below = isinstance(value, int | float) or str(value).strip().startswith("-")
        why = "must be a positive number of bytes" if below else "is not an amount of memory"
        raise ValueError(f"{why}; write {BYTES_FORMS}")
    unit = found["unit"].lower()
    if unit not in FACTORS:
        meant = f"{unit.upper()}iB or {unit.upper()}B" if len(unit) == 1 else "MiB, GiB or GB"
        raise ValueError(f"has an unknown unit {found['unit']!r} (meant: {meant}?)")
    count = float(found["number"]) * FACTORS[unit]
    if not math.isfinite(count) or count < 1:
        raise ValueError(f"must be at least one byte; write {BYTES_FORMS}")
    return int(count) if not found["number"].isdigit() else int(found["number"]) * FACTORS[unit]


def written_bytes(number: str, unit: str, binary: bool = False) -> int:
    """Return the bytes that an amount found in a text stands for.

    Args:
        number: as written, ``1,024`` and ``2.5e3`` included (`WRITTEN_NUMBER`).
        unit: a key of `WRITTEN_FACTORS`, in any case.
        binary: the writer means 2^30 by GB, as Paddle does, and torch's MPS allocator did before
            it wrote GiB.

    """
    unit = unit.lower()
    if binary and len(unit) == 2 and unit.endswith("b"):
        unit = unit[0]
    count = float(number.replace(",", "")) * WRITTEN_FACTORS[unit]
    return round(count) if math.isfinite(count) else sys.maxsize


def parse_percent(text: str) -> float | None:
    """Return the number of a text like ``80%``, whatever it is; None for other texts."""
    found = _PERCENT.fullmatch(text)
    return None if found is None else float(found["number"])


def budget_problem(value: object, name: str = "memory.budget") -> str | None:
    """Return what is wrong with a memory budget on any device, None if nothing."""
    text = str(value).strip()
    percent = parse_percent(text)
    if text.lower() == "auto" or (percent is not None and 0 < percent <= 100):
        return None
    if percent is not None:
        return f"{name}={text}: a share must be above 0% and at most 100% of the device's memory"
    try:
        parse_bytes(value)
    except ValueError as error:
        return f"{name}={text} {error}; a budget may also be 80% (of the device) or auto (free now)"
    return None


def card_problem(value: object, name: str = "memory.card") -> str | None:
    """Return what is wrong with the size of a card, None if nothing."""
    try:
        if parse_bytes(value) > CONTEXT_BYTES:
            return None
    except ValueError as error:
        return f"{name}={value} {error}"
    return f"{name}={value} must be above {format_bytes(CONTEXT_BYTES)}, like {name}=24GiB"


def format_allocation(count: int) -> str:
    """Return `count` bytes as torch's allocators write them: ``20.00 MiB``, ``512 bytes``.

    Source: format_size in c10/cuda/CUDACachingAllocator.cpp.
    """
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def format_bytes(count: int | None) -> str:
    """Return `count` bytes for a reader: ``4.88 GiB``, ``481.3 MiB``, or ``not measured``."""
    if count is None:
        return "not measured"
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Return a duration for a reader: ``8.2 s``, ``3:07 min``, ``2:05:00 h``."""
    if seconds < 59.95:  # what rounds to 60.0 s is shown as a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"


def counted(count: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``, ``34,272 steps``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def with_gib(values: Mapping[str, float]) -> dict[str, float]:
    """Return figures, and beside each of bytes the same in GiB: ``peak_bytes``, ``peak_gib``."""
    gib = {
        f"{name.removesuffix('_bytes')}_gib": value / GIB
        for name, value in values.items()
        if name.endswith("_bytes")
    }
    return {**values, **gib}


def without_gib(values: Mapping[str, float]) -> dict[str, float]:
    """Return figures without those that `with_gib` added; one of GiB alone is somebody's own."""
    return {
        name: value
        for name, value in values.items()
        if not (name.endswith("_gib") and f"{name.removesuffix('_gib')}_bytes" in values)
    }
