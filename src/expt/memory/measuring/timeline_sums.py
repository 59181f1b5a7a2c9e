"""What a timeline of memory sums up to: by phase, by category, by operator, and its peak."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from expt.memory.measuring.timeline import CATEGORIES, PHASES, Timeline

BEFORE = "(before)"


@dataclass(frozen=True)
class Moment:
    """What is allocated at one time, by category."""

    change: int
    """The place of the change that led to it."""
    at_ns: int
    segment: int
    """The place of the stretch of time that it is in."""
    by_category: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.by_category.values())


@dataclass
class PhaseMemory:
    """A phase, at that of its occurrences which came highest: bytes allocated in all."""

    phase: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int
    by_category: dict[str, int]
    """At the phase's peak."""
    times: int = 1
    """How often the phase occurred."""


@dataclass
class OperatorMemory:
    """What an operator asked for in its own right, over all steps."""

    operator: str
    calls: int = 0
    """Those that asked for memory."""
    allocated_bytes: int = 0
    net_bytes: int = 0
    """What of it was not given back before the end of the timeline."""
    most_held_bytes: int = 0
    """The most of it that there was at once."""
    at_peak_bytes: int = 0
    """What of it there was when most was allocated in all."""


@dataclass
class MemorySums:
    """The sums of a timeline."""

    start_bytes: int
    peak_bytes: int
    peak_phase: str
    peak_operator: str
    by_category: dict[str, int]
    """At the peak."""
    phases: list[PhaseMemory]
    operators: list[OperatorMemory] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """The peak of each step."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return asdict(self)


def moments(timeline: Timeline) -> Iterator[Moment]:
    """Yield what is allocated after every change, the first when the beginning is complete."""
    held: Counter[str] = Counter()
    changes = timeline.changes
    for place, (at, number, count) in enumerate(changes):
        held[timeline.blocks[number].category] += count
        beginning = at == changes[0][0]
        if beginning and place + 1 < len(changes) and changes[place + 1][0] == at:
            continue
        yield Moment(place, at, timeline.segment_at(at), dict(held))


def sums_of(timeline: Timeline) -> MemorySums:
    """Sum a timeline up; it has one change at least."""
    seen = list(moments(timeline))
    peak = max(seen, key=lambda moment: moment.bytes)
    highest = timeline.blocks[timeline.changes[peak.change][1]]
    return MemorySums(
        start_bytes=seen[0].bytes,
        peak_bytes=peak.bytes,
        peak_phase=timeline.segments[peak.segment].phase,
        peak_operator=highest.operator,
        by_category=_all(peak.by_category),
        phases=_phases(timeline, seen),
        operators=_operators(timeline, peak.change),
        steps=_steps(timeline, seen),
    )


def _all(by_category: Mapping[str, int]) -> dict[str, int]:
    return {name: by_category.get(name, 0) for name in CATEGORIES}


def _phases(timeline: Timeline, seen: list[Moment]) -> list[PhaseMemory]:
    """Return a row per phase, in the order of a step."""
    found: dict[str, PhaseMemory] = {}
    times = Counter(segment.phase for segment in timeline.segments)
    inside: dict[int, list[Moment]] = defaultdict(list)
    for moment in seen:
        inside[moment.segment].append(moment)
    before = seen[0]
    for place, segment in enumerate(timeline.segments):
        if segment.end_ns <= seen[0].at_ns:
            continue
        here = inside[place]
        high = max([before, *here], key=lambda moment: moment.bytes)
        row = PhaseMemory(
            segment.phase, before.bytes, high.bytes, (here or [before])[-1].bytes,
            _all(high.by_category), times[segment.phase],
        )  # fmt: skip
        if segment.phase not in found or row.peak_bytes > found[segment.phase].peak_bytes:
            found[segment.phase] = row
        before = (here or [before])[-1]
    order = {name: place for place, name in enumerate(PHASES)}
    return sorted(found.values(), key=lambda row: order.get(row.phase, len(order)))


def _operators(timeline: Timeline, peak: int) -> list[OperatorMemory]:
    """Return a row per operator, the one that held most first."""
    found: dict[str, OperatorMemory] = {}
    calls: dict[str, set[int]] = defaultdict(set)
    for place, (_, number, count) in enumerate(timeline.changes):
        block = timeline.blocks[number]
        if block.operator == BEFORE:
            continue
        row = found.setdefault(block.operator, OperatorMemory(block.operator))
        row.allocated_bytes += max(count, 0)
        row.net_bytes += count
        row.most_held_bytes = max(row.most_held_bytes, row.net_bytes)
        if place <= peak:
            row.at_peak_bytes += count
        calls[block.operator].add(block.call)
    for name, row in found.items():
        row.calls = len(calls[name])
    return sorted(found.values(), key=lambda row: (-row.most_held_bytes, row.operator))


def _steps(timeline: Timeline, seen: list[Moment]) -> list[int]:
    """Return the highest that was allocated in every step."""
    peaks = [0] * len(timeline.steps)
    for moment in seen:
        place = sum(start <= moment.at_ns for start in timeline.steps) - 1
        if place >= 0:
            peaks[place] = max(peaks[place], moment.bytes)
    return peaks
