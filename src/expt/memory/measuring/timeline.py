"""A timeline of memory: every allocation and release of a few training steps, and whose it was.

Read from torch.profiler's tree of events, in which the CPU's and CUDA's allocators tell of every
block, what kernels take inside included. The tree says which operator asked; ranges that the
training loop opens (`PHASE`) say in which part of the step; and notes that it leaves (`NOTE`), with
the addresses of tensors that it knows, say what a block is. What nobody named is sorted as
`expt.memory.plan` does it: what the forward pass and the loss leave behind are activations, what is
given back before its operator returns is a workspace, the rest are temporaries.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expt.memory.measuring.ledger import dense_parts

PHASE, NOTE = "phase: ", "note: what is alive"
OPTIMIZER_STEP = "Optimizer.step#"
"""How torch names the ranges in which an optimizer steps, also one that steps in backward."""
PHASES = ("batch", "forward", "loss", "backward", "optimizer_step", "evaluation", "between")
ENDS_STEP = ("optimizer_step", "evaluation", "between")
CATEGORIES = (
    "parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs",
    "workspaces", "other",
)  # fmt: skip
"""Those of a plan, and what was there before and is none of them."""
FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
    )
)
"""Operators that allocate for the one that calls them."""
LAST = (1 << 63, 0, "")
"""A range after all others."""
Place = tuple[int, int]
"""Address and bytes of a storage."""


@dataclass(frozen=True)
class Note:
    """What the loop knew at one moment: storages by category.

    A note that is `whole` begins a step and names all there are, so that those which no allocator
    tells of, such as samples that workers read, end with the first whole note without them.
    """

    known: Mapping[str, Sequence[Place]]
    whole: bool = False


@dataclass
class Block:
    """Memory from one allocation to its release."""

    bytes: int
    operator: str
    phase: str
    call: int = -1
    """Which call of the operator asked for it; -1: it was there before, or nobody saw it come."""
    category: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of time in one phase; those of a timeline follow each other without a gap."""

    phase: str
    start_ns: int
    end_ns: int


@dataclass
class Timeline:
    """What was there and what happened to it.

    `changes` are (time in ns, place in `blocks`, bytes more), in order of time; the first ones, all
    of one time, are what was there at the beginning. Memory from before is one block, "other".
    """

    blocks: list[Block] = field(default_factory=list)
    changes: list[tuple[int, int, int]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """When each step began, in ns."""

    def segment_at(self, moment_ns: int) -> int:
        """Return the place in `segments` of the one at a moment."""
        return max(bisect_right(self.segments, moment_ns, key=lambda part: part.start_ns) - 1, 0)


def places(tensors: Iterable[Tensor], device_type: str) -> list[Place]:
    """Return where the storages of tensors on a device are."""
    found = []
    for tensor in tensors:
        for part in dense_parts(tensor):
            storage = part.untyped_storage()
            if part.device.type == device_type and storage.nbytes():
                found.append((storage.data_ptr(), storage.nbytes()))
    return found


def read_timeline(
    roots: Iterable[Any], notes: Sequence[Note], device: torch.device, held_bytes: int
) -> Timeline:
    """Turn the profiler's events into a timeline.

    Args:
        roots: of ``experimental_event_tree()``.
        notes: in the order of their ranges.
        device: whose memory is meant.
        held_bytes: what was allocated there when the first note was made.

    """
    seen = _Seen(device.type)
    for root in roots:
        seen.walk(root)
    seen.noted.sort()
    timeline = Timeline(segments=list(_segments(seen.ranges, *seen.bounds())))
    _Reading(timeline, seen, notes, held_bytes).read()
    return timeline


@dataclass(frozen=True)
class _Request:
    """An allocator's event: bytes taken (or, negative, given back) at an address."""

    address: int
    bytes: int
    operator: str
    call: int
    returns_ns: int
    """When the operator that asked returned."""


class _Seen:
    """What the profiler's tree holds for a timeline."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self.requests: list[tuple[int, _Request]] = []
        self.ranges: list[tuple[int, int, str]] = []
        self.noted: list[int] = []
        self._times: list[int] = []

    def walk(self, root: Any) -> None:
        """Take in a root and what is below it; by hand, since trees can be deep."""
        waiting: list[tuple[Any, tuple[str, int, int] | None]] = [(root, None)]
        while waiting:
            event, owner = waiting.pop()
            kind = event.tag.name
            if kind == "Allocation":
                self._take(event, owner)
            elif kind == "TorchOp":
                owner = self._range(event, owner)
            waiting += [(child, owner) for child in event.children]

    def bounds(self) -> tuple[int, int]:
        """Return the first and the last moment."""
        return min(self._times, default=0), max(self._times, default=0)

    def _take(self, event: Any, owner: tuple[str, int, int] | None) -> None:
        _, request = event.typed
        if request.device.type != self._device_type or not request.ptr:
            return
        name, call, end = owner or ("(outside of operators)", -1, 0)
        found = _Request(request.ptr, request.alloc_size, name, call, end)
        self.requests.append((event.start_time_ns, found))
        self._times.append(event.start_time_ns)

    def _range(self, event: Any, owner: tuple[str, int, int] | None) -> tuple[str, int, int] | None:
        name, start, end = event.name, event.start_time_ns, event.end_time_ns
        if name == NOTE:
            self.noted.append(start)
        elif name.startswith(PHASE):
            self.ranges.append((start, end, name.removeprefix(PHASE)))
        elif name.startswith(OPTIMIZER_STEP):
            self.ranges.append((start, end, "optimizer_step"))
        elif name in FACTORIES and owner is not None:
            return owner
        elif not name.startswith(("autograd::engine", "ProfilerStep#")):
            return (name, event.id, end)
        else:
            return owner
        self._times += [start, end]
        return None


def _segments(ranges: Sequence[tuple[int, int, str]], begin: int, end: int) -> Iterator[Segment]:
    """Yield stretches of one phase, where the innermost range counts.

    What lies between two phases of a step belongs to the first one; "between" is between steps.
    """
    current = Segment("between", begin, begin)
    for phase, start in _turns(ranges):
        if phase == "between" and current.phase not in ENDS_STEP:
            continue
        if phase != current.phase:
            if start > current.start_ns:
                yield replace(current, end_ns=start)
            current = Segment(phase, start, start)
    yield replace(current, end_ns=end)


def _turns(ranges: Sequence[tuple[int, int, str]]) -> Iterator[tuple[str, int]]:
    """Yield (phase, moment) whenever another range becomes the innermost."""
    open_ranges: list[tuple[int, str]] = []
    for start, stop, name in [*sorted(ranges, key=lambda one: (one[0], -one[1])), LAST]:
        while open_ranges and open_ranges[-1][0] <= start:
            until, _ = open_ranges.pop()
            yield (open_ranges[-1][1] if open_ranges else "between", until)
        if stop:
            open_ranges.append((stop, name))
            yield name, start


class _Reading:
    """Replays requests and notes in order of time; the timeline begins at the first note."""

    def __init__(
        self, timeline: Timeline, seen: _Seen, notes: Sequence[Note], held_bytes: int
    ) -> None:
        self._timeline, self._seen, self._notes = timeline, seen, notes
        self._held_bytes = held_bytes
        self._live: dict[int, int] = {}  # place in blocks, by address
        self._returns: dict[int, int] = {}  # when the operator that asked returned, by block
        self._unseen: set[int] = set()  # addresses of which only notes told
        self._rest: int | None = None  # the block that stands for what nobody knows

    def read(self) -> None:
        """Fill the timeline."""
        segments = self._timeline.segments
        ends = [(s.end_ns, 0, s.phase) for s in segments if s.phase in ("batch", "loss")]
        noted = [(at, 1, note) for at, note in zip(self._seen.noted, self._notes, strict=False)]
        asked = [(at, 2, request) for at, request in self._seen.requests]
        happened: list[tuple[int, int, Any]] = [*ends, *noted, *asked]
        for at, _, what in sorted(happened, key=lambda one: one[:2]):
            if isinstance(what, Note):
                self._note(at, what)
            elif isinstance(what, str):
                self._survived(what)
            elif what.bytes > 0:
                self._take(at, what)
            else:
                self._give_back(at, what)
        for block in self._timeline.blocks:
            block.category = block.category or "temporaries"

    def _take(self, at: int, request: _Request) -> None:
        self._leave(at, request.address)  # its release was not seen
        segments = self._timeline.segments
        phase = segments[self._timeline.segment_at(at)].phase if segments else "between"
        block = Block(request.bytes, request.operator, phase, request.call)
        self._returns[self._enter(at, request.address, block)] = request.returns_ns

    def _give_back(self, at: int, request: _Request) -> None:
        number = self._live.get(request.address)
        if number is not None:
            block = self._timeline.blocks[number]
            if not block.category and at <= self._returns.get(number, 0):
                block.category = "workspaces"
            self._leave(at, request.address)
        elif self._rest is not None:  # it was there before, and nobody knew it
            self._change(at, self._rest, request.bytes)

    def _note(self, at: int, note: Note) -> None:
        for category, known in note.known.items():
            for address, count in known:
                if address not in self._live:
                    self._enter(at, address, Block(count, "(before)", "before"))
                    self._unseen.add(address)
                block = self._timeline.blocks[self._live[address]]
                block.category = block.category or category
        if note.whole:
            self._timeline.steps.append(at)
            named = {address for known in note.known.values() for address, _ in known}
            for address in self._unseen - named:
                self._leave(at, address)
        if self._rest is None:
            self._begin(at)

    def _begin(self, at: int) -> None:
        """Let what is there at the first note, and the rest of what is held, be the beginning."""
        timeline = self._timeline
        timeline.changes = [
            (at, number, timeline.blocks[number].bytes) for number in self._live.values()
        ]
        known = sum(count for _, _, count in timeline.changes)
        self._rest = len(timeline.blocks)
        timeline.blocks.append(Block(max(self._held_bytes - known, 0), "(before)", "before"))
        timeline.blocks[-1].category = "other"
        self._change(at, self._rest, timeline.blocks[-1].bytes)

    def _survived(self, phase: str) -> None:
        """Name what a phase leaves behind, of what nobody has named."""
        category = "inputs" if phase == "batch" else "activations"
        made_in = ("batch",) if phase == "batch" else ("forward", "loss")
        for number in self._live.values():
            block = self._timeline.blocks[number]
            if not block.category and block.phase in made_in:
                block.category = category

    def _enter(self, at: int, address: int, block: Block) -> int:
        number = self._live[address] = len(self._timeline.blocks)
        self._timeline.blocks.append(block)
        self._change(at, number, block.bytes)
        return number

    def _leave(self, at: int, address: int) -> None:
        number = self._live.pop(address, None)
        self._unseen.discard(address)
        if number is not None:
            self._change(at, number, -self._timeline.blocks[number].bytes)

    def _change(self, at: int, number: int, count: int) -> None:
        self._timeline.changes.append((at, number, count))
