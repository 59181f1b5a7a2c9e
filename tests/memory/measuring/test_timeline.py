"""A timeline of memory: against the allocator's own count, and on events made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile, record_function

from expt.memory.measuring.allocations import Allocations
from expt.memory.measuring.timeline import (
    CATEGORIES,
    NOTE,
    PHASE,
    Note,
    Timeline,
    places,
    read_timeline,
)
from expt.memory.measuring.timeline_sums import moments, sums_of
from expt.memory.planning.plan import CATEGORIES as PLANNED

CPU = torch.device("cpu")
KIB = 1024


class Event:
    """What the profiler's tree has of a range or an allocation."""

    numbers = iter(range(10**6))

    def __init__(self, name: str, start: int, end: int, *children: Event) -> None:
        self.name, self.start_time_ns, self.end_time_ns = name, start, end
        self.children, self.id = children, next(self.numbers)
        self.tag = SimpleNamespace(name="TorchOp")


class Request(Event):
    """An allocation of `count` bytes at an address, or, where it is negative, a release."""

    def __init__(self, at: int, address: int, count: int, device: str = "cpu") -> None:
        super().__init__("[memory]", at, at)
        self.tag = SimpleNamespace(name="Allocation")
        fields = SimpleNamespace(ptr=address, alloc_size=count, device=torch.device(device))
        self.typed = (self.tag, fields)


def read(*roots: Event, notes: Iterable[Note] = (Note({}),), held: int = 0) -> Timeline:
    first = Event(NOTE, 0, 1)
    return read_timeline([first, *roots], list(notes), CPU, held)


def blocks(timeline: Timeline) -> dict[str, tuple[int, str, str]]:
    """Bytes, phase and category by operator."""
    return {b.operator: (b.bytes, b.phase, b.category) for b in timeline.blocks}


def test_categories_are_those_of_a_plan():
    assert tuple(PLANNED) == CATEGORIES[:-1]


def test_what_nobody_named_is_sorted_by_when_it_is_given_back():
    timeline = read(
        Event(
            f"{PHASE}batch", 5, 8,
            Event("aten::index", 6, 7, Request(6, 90, 9)),
        ),
        Event(
            f"{PHASE}forward", 10, 50,
            Event("aten::mm", 12, 20, Event("aten::empty", 13, 14, Request(13, 100, 64))),
            Event(
                "aten::conv", 22, 30,
                Request(23, 200, 32), Request(24, 300, 16), Request(29, 300, -16),
            ),
            Event("aten::add", 32, 36, Request(33, 400, 8)),
            Request(40, 400, -8),
        ),
        Event(f"{PHASE}loss", 50, 60, Event("aten::nll", 51, 59, Request(55, 500, 4))),
        Event(
            f"{PHASE}backward", 60, 90,
            Event("aten::mul", 61, 70, Request(62, 600, 2)),
            Request(80, 200, -32),
        ),
    )  # fmt: skip
    found = [(b.operator, b.bytes, b.phase, b.category) for b in timeline.blocks if b.bytes]
    assert found == [
        ("aten::index", 9, "batch", "inputs"),
        ("aten::mm", 64, "forward", "activations"),
        ("aten::conv", 32, "forward", "activations"),
        ("aten::conv", 16, "forward", "workspaces"),
        ("aten::add", 8, "forward", "temporaries"),
        ("aten::nll", 4, "loss", "activations"),
        ("aten::mul", 2, "backward", "temporaries"),
    ]
    sums = sums_of(timeline)
    assert (sums.peak_bytes, sums.peak_phase, sums.peak_operator) == (121, "forward", "aten::conv")
    rows = {row.operator: row for row in sums.operators}
    conv = rows["aten::conv"]
    assert (conv.calls, conv.allocated_bytes, conv.net_bytes) == (1, 48, 0)
    assert (conv.most_held_bytes, conv.at_peak_bytes) == (48, 48)
    backward = next(row for row in sums.phases if row.phase == "backward")
    assert (backward.start_bytes, backward.peak_bytes, backward.end_bytes) == (109, 111, 79)


def test_notes_name_blocks_and_those_that_no_allocator_tells_of():
    timeline = read(
        Event(f"{PHASE}backward", 10, 20, Event("aten::mm", 11, 15, Request(12, 100, 64))),
        Event(NOTE, 21, 22),
        Event(NOTE, 30, 31),
        notes=[
            Note({"parameters": [(1, 40)], "inputs": [(2, 7)]}, whole=True),
            Note({"gradients": [(100, 64)]}),
            Note({"parameters": [(1, 40)], "inputs": [(3, 5)]}, whole=True),
        ],
        held=50,
    )
    assert blocks(timeline)["aten::mm"] == (64, "backward", "gradients")
    seen = [{name: n for name, n in m.by_category.items() if n} for m in moments(timeline)]
    assert seen[0] == {"parameters": 40, "inputs": 7, "other": 3}
    assert timeline.steps == [0, 30]
    assert seen[-1] == {"parameters": 40, "inputs": 5, "other": 3, "gradients": 64}


def test_an_optimizer_that_steps_in_backward_has_its_own_phase():
    timeline = read(
        Event(
            f"{PHASE}backward", 10, 90,
            Event("Optimizer.step#AdamW.step", 40, 50, Event("aten::zeros", 41, 42)),
        ),
    )  # fmt: skip
    phases = [(part.phase, part.start_ns, part.end_ns) for part in timeline.segments]
    assert phases == [
        ("between", 0, 10), ("backward", 10, 40), ("optimizer_step", 40, 50), ("backward", 50, 90),
    ]  # fmt: skip


def test_moments_between_two_phases_of_a_step_belong_to_the_first():
    timeline = read(
        Event(f"{PHASE}forward", 10, 20),
        Event(f"{PHASE}backward", 25, 30),
        Event(f"{PHASE}optimizer_step", 32, 40, Event("Optimizer.step#SGD.step", 33, 38)),
        Event(f"{PHASE}forward", 50, 60),
    )
    phases = [(part.phase, part.start_ns, part.end_ns) for part in timeline.segments]
    assert phases == [
        ("between", 0, 10), ("forward", 10, 25), ("backward", 25, 32), ("optimizer_step", 32, 40),
        ("between", 40, 50), ("forward", 50, 60),
    ]  # fmt: skip


def test_a_release_of_what_was_there_before_and_another_device_s_memory():
    timeline = read(
        Request(10, 100, -30), Request(11, 200, 64, device="meta"), Request(12, 300, 5), held=100
    )
    assert [moment.bytes for moment in moments(timeline)] == [100, 70, 75]


def test_addresses_are_of_storages_on_the_device():
    whole = torch.zeros(4, 8)
    assert places([whole, whole[2:]], "cpu") == [(whole.data_ptr(), 128)] * 2
    assert places([whole, torch.empty(0)], "cuda") == []


@pytest.fixture
def step() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Callable[[str], Any]], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.long)

    def do(phase: Callable[[str], Any]) -> None:
        with phase(f"{PHASE}forward"):
            outputs = model(images)
        with phase(f"{PHASE}loss"):
            loss = nn.functional.cross_entropy(outputs, labels)
        with phase(f"{PHASE}backward"):
            loss.backward()
        with phase(f"{PHASE}optimizer_step"):
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizer, do


def test_the_peak_is_that_of_the_allocator_to_the_byte(step):
    model, _, do = step
    for _ in range(2):
        do(record_function)
    with Allocations() as allocations:
        do(record_function)
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function(NOTE):
            known = {"parameters": places(model.parameters(), "cpu")}
        do(record_function)
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    weights = sum(weight.nbytes for weight in model.parameters())
    sums = sums_of(read_timeline(roots, [Note(known, whole=True)], CPU, 3 * weights))
    assert sums.start_bytes == 3 * weights
    assert sums.by_category["other"] == 2 * weights
    assert sums.peak_bytes == 3 * weights + allocations.highest_bytes
    assert [row.phase for row in sums.phases if row.phase != "between"] == [
        "forward", "loss", "backward", "optimizer_step",
    ]  # fmt: skip
