"""The figures of an out-of-memory message, and what they say about its cause.

The wordings of CUDA, HIP and XPU differ by version but use the same phrases in both orders:
``21.45 GiB already allocated`` and ``Of the allocated memory 21.45 GiB is allocated by PyTorch``.
MPS and the host's allocator have their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from expt.units import GIB, WRITTEN_NUMBER, WRITTEN_UNIT, written_bytes

Cause = Literal[
    "full",  # tensors fill the device
    "fragmentation",  # the allocator holds enough, but not in one piece
    "other_process",  # somebody else holds much of the device
    "limit",  # a cap on this process or on one allocation, lower than the device
    "transient",  # there was room when the message was written, and it names no limit
    "too_large",  # one tensor larger than the whole device
    "unknown",  # the message gives no figures to judge by
]

FRAGMENTED = 0.05
"""Least part of what is reserved that must be without a tensor, though it would hold the request:
less is the rest of a full device."""
FRAGMENTED_UNASKED = 0.2
"""The same where the message does not say how much was asked for (handbook: 20 to 30 %), or names
a limit, to which small pieces are no answer."""
CROWDED = 0.2
"""Least part of the device that others must hold."""
CONTEXT_BYTES = 3 * GIB // 2
"""Most that a CUDA context and library workspaces add to what the allocator holds."""
ONE_ALLOCATION_BYTES = 4 * 10**9
"""Size from which on some devices (Intel Arc) refuse a single allocation, however much is free."""


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
    def held_bytes(self) -> int | None:
        """All that this process is known to hold."""
        counts = (self.process_bytes, self.reserved_bytes, self.allocated_bytes)
        return next((count for count in counts if count is not None), None)

    @property
    def others_bytes(self) -> int | None:
        """What others hold: as the message says, or what is neither free nor this process's.

        Where the message does not say what is free, it is all that this process does not hold, if
        the request would have fit into it.
        """
        held, total = self.held_bytes, self.total_bytes
        if self.other_processes_bytes is not None:
            return self.other_processes_bytes
        if total is None or held is None:
            return None
        if self.free_bytes is not None:
            return max(total - self.free_bytes - held, 0)
        return total - held if held + (self.requested_bytes or 0) <= total else None

    @property
    def others_are_inferred(self) -> bool:
        """Whether `others_bytes` rests on nothing but that the request would have fit."""
        return (
            self.free_bytes is None
            and self.other_processes_bytes is None
            and (self.others_bytes or 0) > 0
        )

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
    """Compile a phrase: ``#`` stands for an amount, ``@`` for one whose unit may be missing.

    ``~`` is an amount that is passed over, and a space any white space.
    """
    unit = rf"(?P<unit>{WRITTEN_UNIT})(?![a-z])"
    marks = {
        " ": r"\s+",
        "#": rf"(?P<number>{WRITTEN_NUMBER})\s*{unit}",
        "@": rf"(?P<number>{WRITTEN_NUMBER})(?:\s*{unit})?",
        "~": rf"{WRITTEN_NUMBER}\s*(?:{WRITTEN_UNIT})",
    }
    spelled = "".join(marks.get(mark, mark) for mark in pattern)
    return re.compile(spelled, re.IGNORECASE)


_PHRASES = {
    "requested_bytes": (
        r"try(?:ing|ied)? to allocate #",
        r"tried to allocate #",
        r"(?:unable|failed|not|attempting) to allocate(?: (?:request for|memory of))? #",
        r"cannot allocate #",
        r"requested\s*: #",
        r"out of memory(?: while trying to allocate| allocating) #",
        r"[cm]alloc(?: async| host)? #",
        r"(?:malloc|allocation) (?:of|for)(?: size)?[ :]+#",
        r"requested buffer of size @",
        r"not allocate tensor with #",
        r"request memory size: @",
        r"[md]evice memory failed, size ?\[@",
        r"rtMalloc fail\w*,[^\n]{0,60}?size: ?@",
        r"invalid buffer size: #",
        r"unable to mmap #",
    ),
    "total_bytes": (
        r"total capaci?ty of #",
        r"# total capacity",
        r"# total\b",
        r"device limit\s*: #",
        r"max allowed: #",
        r"used ~ of # hbm",
        r"was ~ / #",
    ),
    "free_bytes": (
        r"of which # is free",
        r"there are # free",
        r"free \(according to CUDA\)\s*: #",
        r"# free\b",
        r"# is free\b",
        r"available memory is(?: only)? #",
        r"available memory size:? @",
    ),
    "allocated_bytes": (
        r"# is allocated by PyTorch",
        r"# already allocated",
        r"# allocated by PyTorch",
        r"MPS allocated: #",
        r"allocated so far: #",
        r"currently allocated\s*: #",
        r"# memory has been allocated",
        r"# allocated\b",
    ),
    "reserved_bytes": (r"# reserved in total", r"# reserved(?! by PyTorch but)(?! but)\b"),
    "unused_bytes": (r"# is reserved by PyTorch but unallocated", r"# reserved but unallocated"),
    "process_bytes": (r"this process has # memory in use",),
    "limit_bytes": (
        r"# allowed\b",
        r"max allowed: #",
        r"with size larger than #",
        r"PyTorch limit [^:]{0,80}: #",
        r"limit(?: of|:)? #",
        r"budget(?: of|:)? #",
    ),
    "other_processes_bytes": (r"other allocations: #",),
}
_COMPILED = {name: [_phrase(pattern) for pattern in found] for name, found in _PHRASES.items()}
_PROCESS = _phrase(r"Process (?P<id>\d+) has # memory in use")
_LABELS_BINARY = re.compile(r"MPS allocated: [\d.]+ [KMGT]B|Out of memory error on GPU")
"""Torch's MPS allocator of old, and Paddle: they write GB for 2^30."""


def read_figures(message: str) -> Figures:
    """Return the amounts a message gives; phrases may be broken over lines."""
    binary = _LABELS_BINARY.search(message) is not None
    values = {name: _first(patterns, message, binary) for name, patterns in _COMPILED.items()}
    if not any(count for name, count in values.items() if name != "requested_bytes"):
        values |= _without_units(message)
    allocated, unused = values["allocated_bytes"], values.pop("unused_bytes")
    if values["reserved_bytes"] is None and allocated is not None and unused is not None:
        values["reserved_bytes"] = allocated + unused
    processes = [written_bytes(one["number"], one["unit"]) for one in _PROCESS.finditer(message)]
    if processes and values["process_bytes"] is None and allocated is not None:
        # In a container torch cannot tell which of the processes it is; the nearest one fits.
        held = values["reserved_bytes"] or allocated
        own = min(processes, key=lambda count: abs(count - held))
        if 0.95 * held <= own <= held + max(held / 10, CONTEXT_BYTES):
            processes.remove(own)
            values["process_bytes"] = own
    if processes:
        values["other_processes_bytes"] = sum(processes)
    return Figures(**values)


def likely_cause(figures: Figures) -> Cause:
    """Judge by the figures alone why the allocation failed."""
    requested, total, free = figures.requested_bytes, figures.total_bytes, figures.free_bytes
    if requested is not None and total is not None and requested > total:
        return "too_large"
    if total is None and free is None and not figures.allocated_bytes:
        return "unknown"
    left = _left_under_limit(figures)
    if left is not None and _is_fragmented(figures, left, FRAGMENTED_UNASKED):
        return "fragmentation"
    if requested is not None and free is not None and free >= requested:
        return "limit" if _names_limit(figures) else "transient"
    if _is_at_limit(figures):
        return "limit"
    if _is_crowded(figures):
        return "other_process"
    return "fragmentation" if _is_fragmented(figures, free or 0, FRAGMENTED) else "full"


def _names_limit(figures: Figures) -> bool:
    """Tell whether there is a limit lower than the device."""
    limit, total = figures.limit_bytes, figures.total_bytes
    return limit is not None and (total is None or limit < total)


def _left_under_limit(figures: Figures) -> int | None:
    """Return what is free of what a limit lets the allocator reserve; None without a limit."""
    if figures.limit_bytes is None or not _names_limit(figures):
        return None
    left = max(figures.limit_bytes - (figures.reserved_bytes or 0), 0)
    return left if figures.free_bytes is None else min(left, figures.free_bytes)


def _is_at_limit(figures: Figures) -> bool:
    """Tell whether a limit lower than the device would be passed."""
    requested, held = figures.requested_bytes or 0, figures.held_bytes
    limit = figures.limit_bytes if _names_limit(figures) else None
    if limit is None:
        return figures.others_are_inferred and requested >= ONE_ALLOCATION_BYTES
    return held is not None and held + requested > limit


def _is_crowded(figures: Figures) -> bool:
    """Tell whether others hold more than a small part of the device."""
    others, total = figures.others_bytes, figures.total_bytes
    if others is None or total is None:
        return False
    stated = figures.other_processes_bytes is not None or figures.process_bytes is not None
    return others > max(CROWDED * total, 0 if stated else CONTEXT_BYTES)


def _is_fragmented(figures: Figures, free: int, least: float) -> bool:
    """Tell whether enough is held without a tensor in it, and not just the rest of a full device.

    With what is free, the pieces would hold the request; small pieces of a full device would not.
    They are at least a part `least` of what is reserved.
    """
    unused, fraction = figures.unused_bytes, figures.fragmented_fraction
    if unused is None or fraction is None:
        return False
    requested = figures.requested_bytes
    if requested is None:
        return fraction > FRAGMENTED_UNASKED
    enough = unused + free >= requested
    return enough and unused >= requested / 2 and fraction >= least


def _first(patterns: list[re.Pattern[str]], message: str, binary: bool) -> int | None:
    for pattern in patterns:
        found = pattern.search(message)
        if found is not None:
            return written_bytes(found["number"], found["unit"] or "", binary)
    return None


def _without_units(message: str) -> dict[str, int]:
    """Read a message retold as ``23.69 total, 21.45 allocated``: in the unit of the request."""
    asked = next((one for p in _COMPILED["requested_bytes"] if (one := p.search(message))), None)
    if asked is None:
        return {}
    words = {name: name.removesuffix("_bytes") for name in ("total_bytes", "free_bytes")}
    words |= {"allocated_bytes": "allocated", "reserved_bytes": "reserved"}
    retold = message[asked.end() : asked.end() + 200]
    found = {
        name: re.search(rf"({WRITTEN_NUMBER})\s+{word}\b", retold) for name, word in words.items()
    }
    return {name: written_bytes(one[1], asked["unit"]) for name, one in found.items() if one}
