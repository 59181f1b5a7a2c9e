"""The figures of an out-of-memory message, and what they say about its cause.

The wordings of CUDA, HIP and XPU differ by version but use the same phrases in both orders:
``21.45 GiB already allocated`` and ``Of the allocated memory 21.45 GiB is allocated by PyTorch``.
MPS and the host's allocator have their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from expt.memory.diagnosis.quantities import NUMBER, UNIT, to_bytes
from expt.units import GIB

Cause = Literal[
    "full",  # tensors fill the device
    "fragmentation",  # the allocator holds enough, but not in one piece
    "other_process",  # somebody else holds much of the device
    "limit",  # a cap on this process, lower than the device
    "too_large",  # one tensor larger than the whole device
    "unknown",  # the message gives no figures to judge by
]

FRAGMENTED = 0.2
"""Part of what is reserved that is held but unallocated; from here on tidying pays (handbook: 20
to 30 %)."""
CROWDED = 0.2
"""Part of the device that is neither free nor this process's; its context takes about 0.5 GiB."""

CONTEXT_BYTES = 3 * GIB // 2
"""Most that a CUDA context and library workspaces add to what the allocator holds."""


@dataclass(frozen=True)
class Figures:
    """Bytes that a message gives; None where it does not."""

    requested_bytes: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None  # allocated included
    process_bytes: int | None = None  # all that this process has on the device
    other_processes_bytes: int | None = None
    limit_bytes: int | None = None

    @property
    def unused_bytes(self) -> int | None:
        """What the allocator holds without a tensor in it."""
        if self.reserved_bytes is None or self.allocated_bytes is None:
            return None
        return max(self.reserved_bytes - self.allocated_bytes, 0)

    @property
    def fragmented_fraction(self) -> float | None:
        """Unused part of what is reserved, 0 to 1."""
        unused = self.unused_bytes
        return unused / self.reserved_bytes if unused is not None and self.reserved_bytes else None


def _phrase(pattern: str) -> re.Pattern[str]:
    """Compile a phrase; ``#`` stands for an amount and a space for any white space."""
    amount = rf"(?P<number>{NUMBER})\s*(?P<unit>{UNIT})"
    return re.compile(pattern.replace(" ", r"\s+").replace("#", amount), re.IGNORECASE)


_PHRASES = {
    "requested_bytes": (
        r"try(?:ing|ied)? to allocate #",
        r"tried to allocate #",
        r"unable to allocate #",
        r"[cm]alloc(?: async| host)? #",
        r"invalid buffer size: #",
        r"unable to mmap #",
    ),
    "total_bytes": (r"total capaci?ty of #", r"# total capacity", r"# total\b", r"max allowed: #"),
    "free_bytes": (r"of which # is free", r"# free\b", r"# is free\b"),
    "allocated_bytes": (
        r"# is allocated by PyTorch",
        r"# already allocated",
        r"# allocated by PyTorch",
        r"MPS allocated: #",
        r"# allocated\b",
    ),
    "reserved_bytes": (r"# reserved in total", r"# reserved(?! by PyTorch but)(?! but)\b"),
    "unused_bytes": (r"# is reserved by PyTorch but unallocated", r"# reserved but unallocated"),
    "process_bytes": (r"this process has # memory in use",),
    "limit_bytes": (r"# allowed\b", r"max allowed: #", r"limit(?: of|:)? #", r"budget(?: of|:)? #"),
}
_COMPILED = {name: [_phrase(pattern) for pattern in found] for name, found in _PHRASES.items()}
_PROCESS = _phrase(r"Process (?P<id>\d+) has # memory in use")
_LABELS_BINARY = re.compile(r"MPS allocated: [\d.]+ [KMGT]B")


def read_figures(message: str) -> Figures:
    """Return the amounts a message gives; phrases may be broken over lines."""
    binary = _LABELS_BINARY.search(message) is not None
    values = {name: _first(patterns, message, binary) for name, patterns in _COMPILED.items()}
    if not any(count for name, count in values.items() if name != "requested_bytes"):
        values |= _without_units(message)
    allocated, unused = values["allocated_bytes"], values.pop("unused_bytes")
    if values["reserved_bytes"] is None and allocated is not None and unused is not None:
        values["reserved_bytes"] = allocated + unused
    others = [to_bytes(one["number"], one["unit"]) for one in _PROCESS.finditer(message)]
    if others and values["process_bytes"] is None and allocated is not None:
        # In a container torch cannot tell which of the processes it is; the nearest one fits.
        held = values["reserved_bytes"] or allocated
        own = min(others, key=lambda count: abs(count - held))
        if 0.95 * held <= own <= held + max(held / 10, CONTEXT_BYTES):
            others.remove(own)
            values["process_bytes"] = own
    return Figures(other_processes_bytes=sum(others) if others else None, **values)


def likely_cause(figures: Figures) -> Cause:
    """Judge by the figures alone why the allocation failed."""
    requested, total, free = figures.requested_bytes, figures.total_bytes, figures.free_bytes
    if requested is not None and total is not None and requested > total:
        return "too_large"
    if total is None and free is None and figures.allocated_bytes is None:
        return "unknown"
    if _is_fragmented(figures):
        return "fragmentation"
    if _others(figures) > CROWDED * (total or 0) > 0:
        return "other_process"
    if _is_capped(figures):
        return "limit"
    return "full"


def _is_fragmented(figures: Figures) -> bool:
    """Enough is held unallocated for what was asked, or a large part of all that is held."""
    unused, fraction = figures.unused_bytes, figures.fragmented_fraction
    if unused is None or fraction is None:
        return False
    requested = figures.requested_bytes
    if requested is None:
        return fraction > FRAGMENTED
    # With what is free, the pieces would hold it; little pieces of a full device would not.
    enough = unused + (figures.free_bytes or 0) >= requested
    return enough and unused >= requested / 2 and (fraction > FRAGMENTED or unused >= requested)


def _is_capped(figures: Figures) -> bool:
    """Tell whether the device had room, or this process stands at a lower limit."""
    requested, free, limit = figures.requested_bytes, figures.free_bytes, figures.limit_bytes
    if requested is not None and free is not None and free >= requested:
        return True
    held = figures.process_bytes or figures.reserved_bytes or figures.allocated_bytes
    if limit is None or held is None or limit == figures.total_bytes:
        return False
    return held + (requested or 0) > limit


def _others(figures: Figures) -> int:
    """Return the bytes on the device that are not this process's."""
    if figures.other_processes_bytes:
        return figures.other_processes_bytes
    total, free = figures.total_bytes, figures.free_bytes
    own = figures.process_bytes or figures.reserved_bytes or figures.allocated_bytes
    if total is None or free is None or own is None:
        return 0
    return total - free - own


def _first(patterns: list[re.Pattern[str]], message: str, binary: bool) -> int | None:
    for pattern in patterns:
        found = pattern.search(message)
        if found is not None:
            return to_bytes(found["number"], found["unit"], binary)
    return None


def _without_units(message: str) -> dict[str, int]:
    """Read a message retold as ``23.69 total, 21.45 allocated``: in the unit of the request."""
    asked = next((one for p in _COMPILED["requested_bytes"] if (one := p.search(message))), None)
    if asked is None:
        return {}
    words = {name: name.removesuffix("_bytes") for name in ("total_bytes", "free_bytes")}
    words |= {"allocated_bytes": "allocated", "reserved_bytes": "reserved"}
    retold = message[asked.end() : asked.end() + 200]
    found = {name: re.search(rf"({NUMBER})\s+{word}\b", retold) for name, word in words.items()}
    return {name: to_bytes(one[1], asked["unit"]) for name, one in found.items() if one}
