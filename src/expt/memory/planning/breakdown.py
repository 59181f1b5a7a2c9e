"""From a trace to a plan: the peak, what was alive there, corrections, and an interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from expt.memory.planning.allocator import CachingAllocator, rounded
from expt.memory.planning.differences import Differences, Kept
from expt.memory.planning.plan import CATEGORIES, Plan, Target
from expt.memory.planning.trace import Storage, StorageTrace, find_peak, running_sums
from expt.units import format_bytes

INTERVALS: Mapping[Target, tuple[float, float]] = {"cpu": (0.95, 1.05), "cuda": (0.95, 1.08)}
"""The bounds over the predicted peak. For the CPU: every row of benchmarks/prediction.py lies
inside. For CUDA: an assumption until benchmarks/gpu_memory.py has been run on a card."""
SLACK: Mapping[Target, int] = {"cpu": 2**18, "cuda": 64 * 2**20}
"""Bytes added to the upper bound: packing in matrix products; larger library workspaces."""
CUBLAS_WORKSPACE = 8519680
"""cuBLAS's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 (32 MiB on Hopper is in the slack)."""
CUBLAS_SEGMENT = 20 * 2**20
NOTES: Mapping[Target, tuple[str, ...]] = {
    "cpu": (),
    "cuda": (
        "block rounding to 512 bytes, a fused attention kernel without a dropout mask, and "
        "CUDA's autocast rules are in the trace; recurrent layers are traced without cuDNN",
    ),
}
LASTING = ("parameters", "optimizer_state")
STEP_PHASES = ("forward", "backward", "optimizer_step")
"""Phases of a training step, which is what a CUDA graph captures."""
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
    outputs_held: bool | None = None

    def of(self, trace: StorageTrace, differences: Differences) -> Plan:
        """Turn a trace into a plan."""
        return read(
            trace, differences, self.target, depth=self.depth, outputs_held=self.outputs_held
        )


def read(
    trace: StorageTrace,
    differences: Differences,
    target: Target,
    *,
    depth: int | None = None,
    outputs_held: bool | None = None,
) -> Plan:
    """Turn a trace into the plan of its steps, from the first forward pass on.

    `depth` is how many levels of a module's name to keep; without it the largest are split.
    `outputs_held` tells whether the loop keeps the last outputs; None: that is not known.
    """
    if outputs_held:
        hold_outputs(trace, differences.outputs)
    size = rounded if target == "cuda" else int
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
    reserved = captured = None
    if target == "cuda":
        allocator = _served(trace)
        exact = sum(peak.alive.values())
        corrections["blocks not split"] = max(0, allocator.peak_allocated_bytes - exact)
        corrections["cuBLAS workspace"] = CUBLAS_WORKSPACE
        reserved = allocator.peak_reserved_bytes + CUBLAS_SEGMENT + sum(peak.scratch.values())
        captured = _captured_bytes(trace)
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
    if outputs_held is None:
        interval, notes = _with_outputs(trace, differences, target, total, interval, notes)
    return Plan(
        target=target,
        peak_bytes=total,
        reserved_bytes=reserved,
        interval_bytes=interval,
        phase=peak.phase,
        by_category=by_category,
        by_module=dict(sorted(by_module.items(), key=lambda item: -item[1])),
        corrections=corrections,
        method="trace",
        seconds=0.0,
        notes=(*NOTES[target], *notes),
        captured_reserved_bytes=captured,
    )


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
    same = (int(total * low), int(total * high) + SLACK[target])
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
    widest = int((total + largest - smallest) * high) + SLACK[target]
    return (int(smallest * low), widest), ("; ".join([words, *found]),)


def _with_outputs(
    trace: StorageTrace,
    differences: Differences,
    target: Target,
    total: int,
    interval: tuple[int, int | None],
    notes: tuple[str, ...],
) -> tuple[tuple[int, int | None], tuple[str, ...]]:
    """Widen the bounds by what a loop holds that keeps the last outputs in a variable."""
    size = rounded if target == "cuda" else int
    held = [trace.events[index] for index in _held_order(trace, differences.outputs)]
    sums = running_sums(held, size)
    more = max(sums, default=0) - max(running_sums(trace.events, size), default=0)
    if more <= NEGLIGIBLE * total or interval[1] is None:
        return interval, notes
    words = (
        f"a loop that keeps the last outputs, loss and batch in variables, as most do, takes up "
        f"to {format_bytes(more)} more; it is in the interval, and in the peak with "
        "outputs_held=True"
    )
    return (interval[0], interval[1] + more), (*notes, words)


def hold_outputs(trace: StorageTrace, outputs: Sequence[Kept]) -> None:
    """Let outputs live until the next ones are made."""
    order = _held_order(trace, outputs)
    place = {before: now for now, before in enumerate(order)}
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
    return order


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


def _captured_bytes(trace: StorageTrace) -> int:
    """Return what is reserved with the training step in a CUDA graph's private pool.

    What a step makes is served from the pool, and what lives throughout or is made by evaluation
    from outside of it; there are two cuBLAS workspaces, since captures have a stream of their own.
    """
    made = {
        number
        for number, storage in enumerate(trace.storages)
        if storage.made and storage.phase in STEP_PHASES and storage.category not in LASTING
    }
    others = set(range(len(trace.storages))) - made
    pools = [_served(trace, chosen).peak_reserved_bytes for chosen in (made, others)]
    return sum(pools) + 2 * CUBLAS_SEGMENT


def _served(trace: StorageTrace, chosen: Set[int] | None = None) -> CachingAllocator:
    """Return the caching allocator after it served the requests for all, or `chosen`, storages."""
    allocator = CachingAllocator()
    live: dict[int, int] = defaultdict(int)
    for number, change, _ in trace.events:
        if chosen is not None and number not in chosen:
            continue
        if live[number]:
            allocator.free(number)
        live[number] += change
        if live[number]:
            allocator.allocate(number, live[number])
    return allocator
