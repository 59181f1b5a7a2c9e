from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.measuring.meter import (
    LEDGER_EVALUATIONS,
    LEDGER_STEPS,
    BudgetMeter,
    CudaMeter,
    LedgerMeter,
    MemoryMeter,
    meter_for,
    process_peak_bytes,
)

KIB = 1024
CUDA = torch.device("cuda", 0)


def allocate(kib: int) -> torch.Tensor:
    return torch.zeros(kib * 256)


def test_the_ledger_watches_the_first_steps_only() -> None:
    meter = LedgerMeter()
    for step in range(LEDGER_STEPS):
        with meter.step():
            allocate(step + 1)
        assert meter.peak_allocated_bytes() == (step + 1) * KIB
    assert isinstance(meter.step(), nullcontext)
    with meter.step():
        allocate(100)
    assert meter.peak_allocated_bytes() == LEDGER_STEPS * KIB


def test_the_ledger_watches_the_first_evaluation_batches_only() -> None:
    meter = LedgerMeter()
    for _ in range(LEDGER_EVALUATIONS):
        with meter.evaluation():
            allocate(5)
    with meter.evaluation():
        allocate(100)
    with meter.step():
        allocate(2)
    assert meter.peak_allocated_bytes() == 5 * KIB


def test_steps_are_not_used_up_by_evaluations() -> None:
    meter = LedgerMeter()
    with meter.evaluation():
        allocate(1)
    for step in range(LEDGER_STEPS):
        with meter.step():
            allocate(2 + step)
    assert meter.peak_allocated_bytes() == (1 + LEDGER_STEPS) * KIB


def test_what_lives_on_between_steps_counts() -> None:
    meter = LedgerMeter()
    with meter.step():
        kept = allocate(4)
    with meter.step():
        allocate(3)
    assert kept.nbytes == 4 * KIB
    assert meter.peak_allocated_bytes() == 7 * KIB


def test_an_error_in_a_step_ends_the_watch() -> None:
    meter = LedgerMeter()
    with pytest.raises(RuntimeError, match="boom"), meter.step():
        raise RuntimeError("boom")
    allocate(50)
    assert meter.peak_allocated_bytes() is None


def test_nothing_measured_is_none_and_not_zero() -> None:
    meter = LedgerMeter()
    assert meter.peak_allocated_bytes() is None
    assert meter.peak_reserved_bytes() is None
    assert set(meter.epoch()) == {"process_peak_bytes"}


def test_an_epoch_of_the_ledger() -> None:
    meter = LedgerMeter()
    meter.start_epoch()
    with meter.step():
        allocate(3)
    epoch = meter.epoch()
    assert epoch["peak_allocated_bytes"] == 3 * KIB
    assert epoch["process_peak_bytes"] == pytest.approx(process_peak_bytes(), rel=0.1)
    meter.start_epoch()
    assert meter.epoch()["peak_allocated_bytes"] == 3 * KIB


def test_a_resumed_run_keeps_the_higher_peak() -> None:
    meter = LedgerMeter()
    meter.restore(10 * KIB, None)
    assert meter.peak_allocated_bytes() == 10 * KIB
    with meter.step():
        allocate(3)
    assert meter.peak_allocated_bytes() == 10 * KIB
    with meter.step():
        allocate(20)
    meter.restore(None, None)
    assert meter.peak_allocated_bytes() == 20 * KIB
    assert meter.peak_reserved_bytes() is None


def test_the_name_says_how_much_is_watched() -> None:
    assert f"first {LEDGER_STEPS} steps" in LedgerMeter().name
    assert "ledger" in LedgerMeter().name


def unfolding(meter: LedgerMeter, steps: int = LEDGER_STEPS) -> int:
    """Convolve in three dimensions, which unfolds the input inside the kernel."""
    layer, x = torch.nn.Conv3d(4, 4, 3, padding=1), torch.randn(1, 4, 8, 32, 32)
    for _ in range(steps):
        with meter.step():
            layer(x).sum().backward()
            layer.zero_grad()
    return x.nbytes


def test_what_kernels_hold_inside_is_measured() -> None:
    meter, blind = LedgerMeter(), LedgerMeter()
    count = unfolding(meter)
    unfolding(blind, LEDGER_STEPS - 1)
    assert blind.peak_allocated_bytes() < 5 * count
    assert meter.peak_allocated_bytes() > 20 * count


def test_a_ledger_that_enforces_a_budget_says_what_it_cannot_see() -> None:
    with BudgetLedger(2**40) as ledger:
        meter = BudgetMeter(ledger)
        assert "cannot see" not in meter.name
        count = unfolding(meter)
        assert "cannot see" in meter.name
        assert meter.peak_allocated_bytes() < 5 * count, "the budget's own count stays"


def test_a_profiler_that_is_on_is_left_alone() -> None:
    meter = LedgerMeter()
    with torch.autograd.profiler.profile():
        unfolding(meter)
    assert meter.peak_allocated_bytes() > 0


def test_the_process_is_measured_in_bytes() -> None:
    # torch alone is some 100 MB; a value in KiB would be a thousandth of it.
    assert 50 * KIB**2 < process_peak_bytes() < 500 * KIB**3


class FakeAllocator:
    """Stands in for CUDA's statistics."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.max_allocated = self.max_reserved = 0

    def use(self, allocated: int, reserved: int) -> None:
        self.allocated, self.reserved = allocated, reserved
        self.max_allocated = max(self.max_allocated, allocated)
        self.max_reserved = max(self.max_reserved, reserved)

    def reset(self) -> None:
        self.max_allocated, self.max_reserved = self.allocated, self.reserved


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> FakeAllocator:
    fake = FakeAllocator()
    for name, read in {
        "max_memory_allocated": lambda device: fake.max_allocated,
        "max_memory_reserved": lambda device: fake.max_reserved,
        "memory_allocated": lambda device: fake.allocated,
        "memory_reserved": lambda device: fake.reserved,
        "reset_peak_memory_stats": lambda device: fake.reset(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, read)
    return fake


def test_cuda_reports_each_epochs_peak_and_the_runs(allocator: FakeAllocator) -> None:
    meter = CudaMeter(CUDA)
    meter.start_epoch()
    with meter.step(), meter.evaluation():
        allocator.use(90, 100)
    allocator.use(10, 100)
    assert meter.epoch() == {
        "peak_allocated_bytes": 90,
        "peak_reserved_bytes": 100,
        "allocated_bytes": 10,
        "reserved_bytes": 100,
    }
    meter.start_epoch()
    allocator.use(40, 60)
    assert meter.epoch()["peak_allocated_bytes"] == 40
    assert (meter.peak_allocated_bytes(), meter.peak_reserved_bytes()) == (90, 100)


def test_cuda_does_not_count_what_was_before_the_run(allocator: FakeAllocator) -> None:
    allocator.use(500, 500)
    allocator.use(5, 5)
    assert CudaMeter(CUDA).peak_allocated_bytes() == 5


def test_cuda_counts_what_came_between_epochs(allocator: FakeAllocator) -> None:
    meter = CudaMeter(CUDA)
    meter.start_epoch()
    meter.epoch()
    allocator.use(70, 80)
    allocator.use(1, 1)
    meter.start_epoch()
    assert (meter.peak_allocated_bytes(), meter.peak_reserved_bytes()) == (70, 80)


def test_cuda_keeps_the_higher_peak_of_a_resumed_run(allocator: FakeAllocator) -> None:
    meter = CudaMeter(CUDA)
    meter.restore(30, 300)
    allocator.use(50, 60)
    assert (meter.peak_allocated_bytes(), meter.peak_reserved_bytes()) == (50, 300)
    meter.restore(None, None)
    assert (meter.peak_allocated_bytes(), meter.peak_reserved_bytes()) == (50, 300)


def test_the_device_decides_the_meter(allocator: FakeAllocator) -> None:
    meters: list[MemoryMeter] = [meter_for(torch.device("cpu")), meter_for(CUDA)]
    assert [type(meter) for meter in meters] == [LedgerMeter, CudaMeter]
    assert isinstance(meter_for(torch.device("mps")), LedgerMeter)


def test_cuda_counts_a_captured_step_as_what_it_took(allocator: FakeAllocator) -> None:
    meter = CudaMeter(CUDA)
    meter.start_epoch()
    allocator.use(90, 100)
    allocator.use(10, 100)
    meter.captured(True)
    meter.start_epoch()
    allocator.use(30, 100)  # replays allocate nothing; this is evaluation
    assert meter.epoch()["peak_allocated_bytes"] == 90
    meter.captured(False)
    allocator.use(5, 100)
    meter.start_epoch()
    assert meter.epoch()["peak_allocated_bytes"] == 5
    assert meter.peak_allocated_bytes() == 90
