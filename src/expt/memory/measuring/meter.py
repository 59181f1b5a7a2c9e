"""Meters of bytes allocated to tensors: CUDA's allocator, or a ledger where there is none."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from expt.memory.measuring.allocations import Allocations, can_be_watched
from expt.memory.measuring.ledger import StorageLedger
from expt.units import format_bytes

SPOKEN_OF = 0.01
"""Share of the peak from which on what a ledger cannot see is spoken of."""
LEDGER_STEPS = 3
"""Optimizer steps that are watched: state is made in the first, the second shows the peak of
tensors, and in the third torch's allocator tells what kernels hold inside on top of them."""
LEDGER_EVALUATIONS = 2
"""Evaluation batches that are watched, the second by the allocator."""


class MemoryMeter(Protocol):
    """Measures bytes allocated to tensors on one device."""

    name: str
    """How it is measured; written to `memory.meter` in the record."""

    def take_in(self, tensors: Sequence[Tensor]) -> None:
        """Note what no watched step makes: samples read by workers, averages of the weights."""

    def held_bytes(self) -> int:
        """Return what is allocated now, as far as it was seen."""

    def step(self) -> AbstractContextManager[object]:
        """Watch one optimizer step."""

    def evaluation(self) -> AbstractContextManager[object]:
        """Watch one evaluation batch."""

    def captured(self, captured: bool) -> None:
        """Note that a step keeps its memory to itself from now on, or no more."""

    def start_stage(self) -> None:
        """Begin anew: other weights are trained from now on than before."""

    def start_epoch(self) -> None:
        """Begin a new peak for the epoch."""

    def epoch(self) -> Mapping[str, int]:
        """Return this epoch's ``peak_allocated_bytes`` and what else the meter knows."""

    def peak_allocated_bytes(self) -> int | None:
        """Return the peak of the whole run, or None while nothing was measured."""

    def peak_reserved_bytes(self) -> int | None:
        """Return the allocator's peak, or None where there is no caching allocator."""

    def restore(self, peak_allocated_bytes: int | None, peak_reserved_bytes: int | None) -> None:
        """Take over the peaks of the part of the run before it was resumed."""


class LedgerMeter:
    """A ledger over the first optimizer steps and evaluation batches.

    What a kernel takes inside is invisible to a ledger. The last step and the last batch run
    without it, and the allocator's own events say how much was taken on top of what it had counted.

    With `helped`, threads that are not watched (gloo's) give back some of it: what seems to be left
    after a step was given back at a time that is not known, and is not counted.
    """

    name = (
        f"ledger of tensor storages over the first {LEDGER_STEPS} steps and {LEDGER_EVALUATIONS} "
        "evaluation batches, with what kernels hold inside"
    )

    def __init__(self, helped: bool = False) -> None:
        self._helped = helped
        self._ledger = StorageLedger()
        self._steps_left = LEDGER_STEPS
        self._evaluations_left = LEDGER_EVALUATIONS
        self._before = 0
        self._with_kernels = 0
        self._stages = 0  # that began after the first

    def take_in(self, tensors: Sequence[Tensor]) -> None:
        """Count them for as long as they live, if they are seen at all."""
        if self._steps_left or self._evaluations_left:
            self._ledger.add(list(tensors))

    def held_bytes(self) -> int:
        """Return what is alive of all that was seen."""
        return self._ledger.allocated_bytes

    def step(self) -> AbstractContextManager[object]:
        """Watch one optimizer step, if it is one of the first."""
        if self._steps_left == 0:
            return nullcontext()
        self._steps_left -= 1
        return self._watch(last=self._steps_left == 0)

    def evaluation(self) -> AbstractContextManager[object]:
        """Watch one evaluation batch, if it is one of the first."""
        if self._evaluations_left == 0:
            return nullcontext()
        self._evaluations_left -= 1
        return self._watch(last=self._evaluations_left == 0)

    def captured(self, captured: bool) -> None:
        """Do nothing: only CUDA's work is captured."""

    def start_stage(self) -> None:
        """Watch as many steps again; the peak of the run so far is kept."""
        self._before = self.peak_allocated_bytes() or 0
        self._ledger.reset_peak()
        self._with_kernels = 0
        self._steps_left, self._evaluations_left = LEDGER_STEPS, LEDGER_EVALUATIONS
        self._stages += 1

    def start_epoch(self) -> None:
        """Do nothing: the ledger watches a few steps of the run, not every epoch."""

    def epoch(self) -> Mapping[str, int]:
        """Return the peak so far, of the stage where there are several, and the process's own.

        The process's includes code and libraries.
        """
        own = max(self._ledger.peak_bytes, self._with_kernels)
        peak = own if self._stages and own else self.peak_allocated_bytes()
        measured = {} if peak is None else {"peak_allocated_bytes": peak}
        return {**measured, "process_peak_bytes": process_peak_bytes()}

    def peak_allocated_bytes(self) -> int | None:
        """Return the peak of what was watched, or None if nothing was yet."""
        return max(self._ledger.peak_bytes, self._with_kernels, self._before) or None

    def peak_reserved_bytes(self) -> int | None:
        """Return None: the CPU has no caching allocator."""
        return None

    def restore(self, peak_allocated_bytes: int | None, peak_reserved_bytes: int | None) -> None:
        """Take over the peak of the part of the run before it was resumed."""
        self._before = max(self._before, peak_allocated_bytes or 0)

    @contextmanager
    def _watch(self, last: bool) -> Iterator[None]:
        if not last or not can_be_watched():
            with self._ledger:
                yield
            return
        held = self._ledger.allocated_bytes
        with Allocations() as allocations:
            yield
        unseen = max(allocations.left_bytes, 0) if self._helped else 0
        self._with_kernels = max(self._with_kernels, held + allocations.highest_bytes - unseen)


class BudgetMeter(LedgerMeter):
    """Reads the ledger that enforces a budget, and so is on all the time.

    What kernels hold inside is not in the budget; `name` says how much more that was at most.
    """

    def __init__(self, ledger: StorageLedger, helped: bool = False) -> None:
        super().__init__(helped)
        self._ledger = ledger
        self._unseen = 0

    def take_in(self, tensors: Sequence[Tensor]) -> None:
        """Count them for as long as they live."""
        self._ledger.add(list(tensors))

    @property
    def name(self) -> str:  # type: ignore[override]
        """What is read, and what it cannot see."""
        words = "ledger of tensor storages over the whole run, which enforces the budget"
        if self._unseen <= SPOKEN_OF * self._ledger.peak_bytes:
            return words
        return f"{words}; it cannot see {format_bytes(self._unseen)} that kernels hold inside"

    @contextmanager
    def _watch(self, last: bool) -> Iterator[None]:
        if not last or not can_be_watched():
            yield
            return
        ledger = self._ledger
        held, peak = ledger.allocated_bytes, ledger.peak_bytes
        ledger.reset_peak()
        try:
            with Allocations() as allocations:
                yield
            unseen = held + allocations.highest_bytes - ledger.peak_bytes
            unseen -= max(allocations.left_bytes, 0) if self._helped else 0
            self._unseen = max(unseen, self._unseen)
        finally:
            ledger.peak_bytes = max(peak, ledger.peak_bytes)


def meter_for(
    device: torch.device, enforcing: StorageLedger | None = None, helped: bool = False
) -> CudaMeter | LedgerMeter:
    """Return the meter for a device, where `enforcing` may be a ledger that is on already.

    `helped`: see `LedgerMeter`.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    return LedgerMeter(helped) if enforcing is None else BudgetMeter(enforcing, helped)


def process_peak_bytes() -> int:
    """Return the process's peak resident set; the kernel reports KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CudaMeter:
    """Reads the caching allocator's own statistics; implements `MemoryMeter`."""

    name = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._allocated = 0
        self._reserved = 0
        self._captured = 0
        torch.cuda.reset_peak_memory_stats(device)

    def take_in(self, tensors: Sequence[Tensor]) -> None:
        """Do nothing: the allocator has counted what is on the device."""

    def held_bytes(self) -> int:
        """Return what is allocated now."""
        return torch.cuda.memory_allocated(self.device)

    def step(self) -> AbstractContextManager[object]:
        """Watch one optimizer step; the allocator watches by itself."""
        return nullcontext()

    def evaluation(self) -> AbstractContextManager[object]:
        """Watch one evaluation batch; the allocator watches by itself."""
        return nullcontext()

    def captured(self, captured: bool) -> None:
        """Note a captured step: replays take what it took, and count as nothing allocated."""
        self._note()
        self._captured = torch.cuda.max_memory_allocated(self.device) if captured else 0

    def start_stage(self) -> None:
        """Do nothing: every epoch has a peak of its own."""

    def start_epoch(self) -> None:
        """Begin a new peak for the epoch."""
        self._note()
        torch.cuda.reset_peak_memory_stats(self.device)

    def epoch(self) -> Mapping[str, int]:
        """Return this epoch's peaks, and what the allocator holds now."""
        self._note()
        return {
            "peak_allocated_bytes": max(
                torch.cuda.max_memory_allocated(self.device), self._captured
            ),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
            "allocated_bytes": torch.cuda.memory_allocated(self.device),
            "reserved_bytes": torch.cuda.memory_reserved(self.device),
        }

    def peak_allocated_bytes(self) -> int | None:
        """Return the peak of the whole run."""
        self._note()
        return self._allocated

    def peak_reserved_bytes(self) -> int | None:
        """Return the allocator's peak over the whole run."""
        self._note()
        return self._reserved

    def restore(self, peak_allocated_bytes: int | None, peak_reserved_bytes: int | None) -> None:
        """Take over the peaks of the part of the run before it was resumed."""
        self._allocated = max(self._allocated, peak_allocated_bytes or 0)
        self._reserved = max(self._reserved, peak_reserved_bytes or 0)

    def _note(self) -> None:
        self._allocated = max(self._allocated, torch.cuda.max_memory_allocated(self.device))
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self.device))
