"""From a trace to a plan: the peak, what was alive there, corrections, and an interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expt.memory.planning.differences import Differences, Kept
from expt.memory.planning.plan import CATEGORIES, Plan, Target
from expt.memory.planning.trace import Storage, StorageTrace, find_peak, running_sums
from expt.units import format_bytes

if TYPE_CHECKING:
    from expt.memory.planning.blocks import Blocks

INTERVALS: Mapping[Target, tuple[float, float]] = {"cpu": (0.95, 1.05), "cuda": (0.95, 1.08)}
"""The bounds over the predicted peak. For the CPU: every row of benchmarks/prediction.py lies
inside. For CUDA: that of what is allocated, which nobody published; what is reserved has bounds
from measurements, see `card`."""
SLACK: Mapping[Target, int] = {"cpu": 2**18, "cuda": 64 * 2**20}
"""Bytes added to the upper bound: packing in matrix products; larger library workspaces."""
HELD = "a loop that keeps the last outputs, loss and batch in variables, as most do"
CUBLAS_WORKSPACE = 8519680
"""cuBLAS's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 (32 MiB on Hopper is in the slack)."""
NOTES: Mapping[Target, tuple[str, ...]] = {
    "cpu": (),
    "cuda": (
        "block rounding to 512 bytes, fused attention, dropout's masks of one byte, and CUDA's "
        "autocast rules are in the trace; recurrent layers are traced without cuDNN",
    ),
}
LEAST_SHARE = 0.01
"""Share of the peak from which on the breakdown names a module apart from what it is part of."""
WARM_UP = 3
"""Steps after which what code keeps from its first call on is there."""
NEGLIGIBLE = 0.01
"""Share of the peak below which a difference is not spoken of."""


@dataclass(frozen=True)
class Reading:
    """How a trace is read; see the arguments of `expt.memory.plan`."""

    target: Target
    depth: int | None = None
    holds_outputs: bool | None = None
    lengths_vary: bool | None = None
    limit_bytes: int | None = None
    blocks: bool = False

    def of(self, trace: StorageTrace, differences: Differences) -> Plan:
        """Turn a trace into the plan of its steps, from the first forward pass on."""
        return read(trace, differences, self)


def read(trace: StorageTrace, differences: Differences, reading: Reading) -> Plan:
    """Turn a trace into a plan, read as `reading` says."""
    target, depth = reading.target, reading.depth
    size = _sizes(target)
    known = reading.holds_outputs is not None
    more = 0 if known else _more_if_held(trace, differences, size)
    if reading.holds_outputs or (not known and target == "cuda"):
        hold_outputs(trace, differences)
    start = next(
        (i for i, event in enumerate(trace.events) if trace.phases[event[2]] == "forward"), 0
    )
    peak = find_peak(trace, size, start)
    by_category = dict.fromkeys(CATEGORIES, 0)
    modules: dict[str, int] = defaultdict(int)
    for number, count in peak.alive.items():
        storage = trace.storages[number]
        by_category[_category(storage)] += count
        modules[storage.module or f"({storage.category or storage.phase})"] += count
    by_module = cut_by_bytes(modules) if depth is None else cut_by_level(modules, depth)
    corrections = dict(peak.scratch)
    card = None
    if target == "cuda":
        from expt.memory.planning.card import on_card

        inside = sum(peak.scratch.values())
        card = on_card(trace, differences, inside, reading.limit_bytes, reading.lengths_vary)
        exact = sum(peak.alive.values())
        corrections["blocks not split"] = max(0, card.allocated_bytes - exact)
        corrections["cuBLAS workspace"] = CUBLAS_WORKSPACE
    by_category["workspaces"] = sum(corrections.values())
    total = sum(by_category.values())
    interval, notes = _interval(trace, differences, target, total, size, start)
    alone = {
        "backward": differences.only_held_bytes, "optimizer_step": differences.batch_bytes,
    }.get(peak.phase, 0)  # fmt: skip
    if alone > NEGLIGIBLE * total:
        interval = (max(interval[0] - alone, 0), interval[1])
        notes = (
            *notes,
            f"of the batch, {format_bytes(alone)} are there only because a variable "
            "of the loop holds it; a loop that does not hold it takes so much less",
        )
    if more > NEGLIGIBLE * total:
        interval, notes = _with_outputs(target, more, interval, notes)
    return Plan(
        target=target,
        peak_bytes=total,
        reserved_bytes=card.reserved_bytes if card else None,
        interval_bytes=interval,
        phase=peak.phase,
        by_category=by_category,
        by_module=dict(sorted(by_module.items(), key=lambda item: -item[1])),
        corrections=corrections,
        method="trace",
        seconds=0.0,
        notes=(*NOTES[target], *notes),
        captured_reserved_bytes=card.captured_bytes if card else None,
        reserved_interval_bytes=card.interval_bytes if card else None,
        requests=card.requests if card else None,
        blocks=_blocks(trace, size, start) if reading.blocks else None,
    )


def _blocks(trace: StorageTrace, size: Callable[[int], int], start: int) -> Blocks:
    from expt.memory.planning.blocks import Blocks

    return Blocks.of(trace, size, start)


def _sizes(target: Target) -> Callable[[int], int]:
    """Return what an allocator takes for a request of so many bytes."""
    if target == "cpu":
        return int
    # Where it is needed: a training on the CPU imports nothing of CUDA's allocator.
    from expt.memory.planning.allocator import rounded

    return rounded


def _category(storage: Storage) -> str:
    if storage.category:
        return storage.category
    return "temporaries" if storage.made else "inputs"


def _interval(
    trace: StorageTrace,
    differences: Differences,
    target: Target,
    total: int,
    size: Callable[[int], int],
    start: int,
) -> tuple[tuple[int, int | None], tuple[str, ...]]:
    """Return the bounds of the peak, wider where steps differ, and what to say about it."""
    low, high = INTERVALS[target]
    slack = SLACK[target] + (trace.workspace_bytes if target == "cuda" else 0)
    same = (int(total * low), int(total * high) + slack)
    if differences.count < 3:
        return same, ()
    peaks = [
        find_peak(trace, size, max(step.first_event, start), step.last_event).bytes
        for step in differences.steps
    ]
    smallest, largest = min(peaks), max(peaks)
    growth = differences.growth_bytes
    words = (
        f"steps differ: {len(peaks)} were traced, with peaks from {format_bytes(smallest)} to "
        f"{format_bytes(largest)}"
    )
    if growth:
        grown = f"{words}; every step leaves {format_bytes(growth)} more, and no end was seen"
        return (int(smallest * low), None), (grown,)
    settled = not any(differences.reasons)
    if largest - smallest <= NEGLIGIBLE * largest or (settled and len(peaks) <= WARM_UP):
        return same, ()
    if settled:
        return (int(smallest * low), same[1]), (f"{words}; the last are alike",)
    why = ("batches have other shapes", "random numbers decide in the forward pass")
    found = [word for word, true in zip(why, differences.reasons, strict=True) if true]
    widest = int((total + largest - smallest) * high) + slack
    return (int(smallest * low), widest), ("; ".join([words, *found]),)


def _more_if_held(trace: StorageTrace, differences: Differences, size: Callable[[int], int]) -> int:
    """Return by how much the peak is higher if the loop keeps the last outputs in variables."""
    held = [trace.events[index] for index in _held_order(trace, differences.outputs)]
    sums = running_sums(held, size)
    return max(sums, default=0) - max(running_sums(trace.events, size), default=0)


def _with_outputs(
    target: Target, more: int, interval: tuple[int, int | None], notes: tuple[str, ...]
) -> tuple[tuple[int, int | None], tuple[str, ...]]:
    """Widen the bounds by what the loop may hold, where that is not known, and say so."""
    low, high = interval
    if target == "cuda":
        words = (
            f"assumed is {HELD}; that is {format_bytes(more)} of the peak, and not there with "
            "holds_outputs=False"
        )
        return (max(low - more, 0), high), (*notes, words)
    if high is None:
        return interval, notes
    words = (
        f"{HELD}, takes up to {format_bytes(more)} more; it is in the interval, and in the peak "
        "with holds_outputs=True"
    )
    return (low, high + more), (*notes, words)


def hold_outputs(trace: StorageTrace, differences: Differences) -> None:
    """Let outputs live until the next ones are made."""
    order = _held_order(trace, differences.outputs)
    place = {before: now for now, before in enumerate(order)}

    def begins(event: int) -> int:
        """Return where the first is that stayed in place, of those from an event on."""
        later = range(event, len(order))
        return next((place[at] for at in later if place[at] <= at), len(order))

    for step in differences.steps:
        step.first_event, step.last_event = begins(step.first_event), begins(step.last_event)
    trace.events = [trace.events[index] for index in order]
    trace.scratch = [(place.get(at, at), count, name) for at, count, name in trace.scratch]
    trace.calls = [(place.get(at, at), call) for at, call in trace.calls]


def _held_order(trace: StorageTrace, outputs: Sequence[Kept]) -> list[int]:
    """Return the order of the events if outputs live until the next ones are made."""
    held_until: dict[int, int] = {}
    until: dict[str, int] = {}
    for kept in reversed(outputs):
        for number in kept.numbers:
            end = until.get(kept.kind, len(trace.events))
            held_until[number] = max(held_until.get(number, 0), end)
        until[kept.kind] = kept.event
    moved: dict[int, list[int]] = defaultdict(list)
    order: list[int] = []
    for index, (number, change, _) in enumerate(trace.events):
        order += moved.pop(index, [])
        if change < 0 and index < held_until.get(number, 0):
            moved[held_until[number]].append(index)
        else:
            order.append(index)
    return [*order, *(index for late in moved.values() for index in late)]


def cut_by_level(modules: Mapping[str, int], depth: int) -> dict[str, int]:
    """Sum the bytes of modules by the first `depth` levels of their names."""
    found: dict[str, int] = defaultdict(int)
    for name, count in modules.items():
        found[name if name.startswith("(") else ".".join(name.split(".")[:depth])] += count
    return found


def cut_by_bytes(modules: Mapping[str, int]) -> dict[str, int]:
    """Split modules into their parts as long as these take a share that matters."""
    least = LEAST_SHARE * sum(modules.values())
    whole: dict[str, int] = defaultdict(int)
    for name, count in modules.items():
        for prefix in _prefixes(name):
            whole[prefix] += count
    found: dict[str, int] = defaultdict(int)
    for name, count in modules.items():
        large = [prefix for prefix in _prefixes(name) if whole[prefix] >= least]
        found[large[-1] if large else _prefixes(name)[0]] += count
    return found


def _prefixes(name: str) -> list[str]:
    """Return a module's name cut after every level, the shortest first."""
    if name.startswith("("):
        return [name]
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
