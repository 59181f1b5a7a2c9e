"""What CUDA's caching allocator makes of a trace, and how far off that may be.

The bounds of what is reserved carry what a trace cannot show:

- cuDNN's workspaces, which it takes where there is room and does without where there is not: up
  to three times the operands of the largest convolution (`StorageTrace.workspace_bytes`);
- lengths that vary: an iteration over shorter sequences leaves blocks that the next cannot use. A
  few sequences, of which the longest sets the length of the batch, rarely have the same twice. The
  allocator is simulated with a first step that was shorter;
- the rest, from what lies in the CUDA context to ties between blocks: the factors.

The constants come from published measurements of half of the models, see
`benchmarks/published_gpu.py`, which shows them on the other half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from expt.memory.planning.allocator import Requests, served
from expt.memory.planning.differences import Differences
from expt.memory.planning.trace import StorageTrace
from expt.units import MIB

LOW, HIGH = 0.92, 1.05
SLACK = 64 * MIB
"""Added to the upper bound: libraries' handles, kernels that are loaded late."""
FEW_SEQUENCES = 20
"""Of more than these the longest has the greatest length, nearly always."""
SHORTER = (0.9, 0.98)
"""Lengths of the sequences before, as shares."""
OF_ANY_LENGTH = ("parameters", "gradients", "optimizer_state", "inputs")
"""Categories whose size does not follow from the length of the sequences."""
CUBLAS_SEGMENT = 20 * 2**20
"""The segment that cuBLAS's workspaces are in."""
LASTING = ("parameters", "optimizer_state")
STEP_PHASES = ("forward", "backward", "optimizer_step")
"""Phases of a training step, which is what a CUDA graph captures."""


@dataclass(frozen=True)
class Card:
    """Bytes that the allocator hands out and reserves for a trace, and what it was asked for."""

    allocated_bytes: int
    reserved_bytes: int
    captured_bytes: int
    interval_bytes: tuple[int, int | None]
    requests: Requests


def on_card(
    trace: StorageTrace,
    differences: Differences,
    inside_bytes: int,
    limit_bytes: int | None,
    lengths_vary: bool | None,
) -> Card:
    """Simulate the allocator of a card with `limit_bytes` for it.

    `inside_bytes` is what the kernel at the peak holds; `lengths_vary` tells whether batches of
    sequences have other lengths, None: that is not known.
    """
    changes = tuple((number, change) for number, change, _ in trace.events)
    requests = Requests(changes, CUBLAS_SEGMENT + inside_bytes)
    allocator = served(changes)
    reserved = allocator.peak_reserved_bytes + requests.beside_bytes
    if limit_bytes is not None and reserved > limit_bytes:
        reserved = requests.reserved_bytes(limit_bytes)
    bounds = reserved_interval(trace, differences, requests, reserved, limit_bytes, lengths_vary)
    captured = _captured_bytes(trace)
    return Card(allocator.peak_allocated_bytes, reserved, captured, bounds, requests)


def reserved_interval(
    trace: StorageTrace,
    differences: Differences,
    requests: Requests,
    reserved_bytes: int,
    limit_bytes: int | None,
    lengths_vary: bool | None,
) -> tuple[int, int]:
    """Return bounds of what the allocator reserves; the arguments are those of `on_card`."""
    highest = reserved_bytes
    few = 0 < differences.sequences <= FEW_SEQUENCES
    if lengths_vary or (lengths_vary is None and few):
        longer = [
            Requests(tuple(_after_shorter(trace, differences, share)), requests.beside_bytes)
            for share in SHORTER
        ]
        highest = max(highest, *(one.reserved_bytes(limit_bytes) for one in longer))
    workspaces = trace.workspace_bytes
    if limit_bytes is not None:
        workspaces = min(workspaces, max(limit_bytes - highest, 0))
    return int(LOW * reserved_bytes), int(HIGH * highest) + workspaces + SLACK


def _after_shorter(
    trace: StorageTrace, differences: Differences, share: float
) -> Iterator[tuple[int, int]]:
    """Yield the requests of a trace whose first step was over shorter sequences."""
    first = differences.steps[0]
    born: set[int] = set()
    scaled: set[int] = set()
    for index, (number, change, _) in enumerate(trace.events):
        storage = trace.storages[number]
        if number not in born:
            born.add(number)
            inside = first.first_event <= index < first.last_event
            if inside and storage.made and storage.category not in OF_ANY_LENGTH:
                scaled.add(number)
        if number in scaled:
            change = int(share * change)
        if change:
            yield number, change


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
    pools = [
        served((number, change) for number, change, _ in trace.events if number in chosen)
        for chosen in (made, others)
    ]
    return sum(pool.peak_reserved_bytes for pool in pools) + 2 * CUBLAS_SEGMENT
