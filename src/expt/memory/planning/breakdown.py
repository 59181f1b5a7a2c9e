"""From a trace to a plan: the peak, what was alive there, corrections, and an interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set

from expt.memory.planning.allocator import CachingAllocator, rounded
from expt.memory.planning.peak_plan import CATEGORIES, Plan, Target
from expt.memory.planning.trace import Storage, StorageTrace, find_peak

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
STEP_PHASES = ("forward", "backward", "optimizer_step")
"""Phases of a training step, which is what a CUDA graph captures."""
MODULE_DEPTH = 3
"""Levels of a module's name that the breakdown by module keeps."""


def read(trace: StorageTrace, target: Target, seconds: float) -> Plan:
    """Turn a trace into the plan of its step, from the first forward pass on."""
    size = rounded if target == "cuda" else int
    start = next(
        (i for i, event in enumerate(trace.events) if trace.phases[event[2]] == "forward"), 0
    )
    peak = find_peak(trace, size, start)
    by_category = dict.fromkeys(CATEGORIES, 0)
    by_module: dict[str, int] = defaultdict(int)
    for number, count in peak.alive.items():
        storage = trace.storages[number]
        by_category[_category(storage)] += count
        by_module[_module(storage)] += count
    corrections = dict(peak.scratch)
    reserved = captured = None
    if target == "cuda":
        allocator = _served(trace)
        exact = sum(peak.alive.values())
        corrections["blocks not split"] = max(0, allocator.peak_allocated_bytes - exact)
        corrections["cuBLAS workspace"] = CUBLAS_WORKSPACE
        reserved = allocator.peak_reserved_bytes + CUBLAS_SEGMENT
        captured = _captured_bytes(trace)
    by_category["workspaces"] = sum(corrections.values())
    total = sum(by_category.values())
    low, high = INTERVALS[target]
    return Plan(
        target=target,
        peak_bytes=total,
        reserved_bytes=reserved,
        interval_bytes=(int(total * low), int(total * high) + SLACK[target]),
        phase=peak.phase,
        by_category=by_category,
        by_module=dict(sorted(by_module.items(), key=lambda item: -item[1])),
        corrections=corrections,
        method="trace",
        seconds=seconds,
        notes=NOTES[target],
        captured_reserved_bytes=captured,
    )


def _category(storage: Storage) -> str:
    if storage.category:
        return storage.category
    return "temporaries" if storage.made else "inputs"


def _module(storage: Storage) -> str:
    if storage.module:
        return ".".join(storage.module.split(".")[:MODULE_DEPTH])
    return f"({storage.category or storage.phase})"


def _captured_bytes(trace: StorageTrace) -> int:
    """Return what is reserved with the training step in a CUDA graph's private pool.

    What a step makes is served from the pool, and what lives throughout or is made by evaluation
    from outside of it; there are two cuBLAS workspaces, since captures have a stream of their own.
    """
    made = {
        number
        for number, storage in enumerate(trace.storages)
        if storage.made and storage.phase in STEP_PHASES
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
