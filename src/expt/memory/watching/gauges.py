"""How full a device is now: CUDA by its allocator and driver, the host by the kernel's own files.

A gauge is cheap (tens of microseconds) and never allocates on the device.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from expt.memory.diagnosis.trend import Reading
from expt.memory.measuring.device_memory import CGROUP, PROC, host_bytes

if TYPE_CHECKING:
    import torch

    from expt.memory.measuring.budget_ledger import BudgetLedger


BUDGET_NAME = "budget"
"""Of the gauge of a run's budget, in its files and its lines."""


class Gauge(Protocol):
    """Reads one device."""

    name: str
    place: str
    """Where its tensors are, in torch's words."""
    total_bytes: int

    def read(self, step: float) -> Reading:
        """Return what is in use now."""

    def used_fraction(self, reading: Reading) -> float:
        """Return how full the device was at a reading, 0 to 1, for whatever reason."""


class CudaGauge:
    """A CUDA device: the caching allocator's figures, and the driver's for everybody else's.

    What the driver counts and this process's allocator does not is `other_bytes`: other
    processes, and this process's context and library workspaces, which do not grow.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._cuda = torch.cuda
        self.name = self.place = str(device)
        self.total_bytes = int(torch.cuda.mem_get_info(device)[1])

    def read(self, step: float) -> Reading:
        """Return the allocator's and the driver's figures; does not wait for the device."""
        statistics = self._cuda.memory_stats(self._device)
        free, total = self._cuda.mem_get_info(self._device)
        reserved = int(statistics.get("reserved_bytes.all.current", 0))
        return Reading(
            step,
            int(statistics.get("allocated_bytes.all.current", 0)),
            reserved,
            max(int(total) - int(free) - reserved, 0),
            int(statistics.get("allocated_bytes.all.peak", 0)),
            int(total),
        )

    def used_fraction(self, reading: Reading) -> float:
        """Return what is reserved here and held by others, of the device."""
        held = (reading.reserved_bytes or 0) + (reading.other_bytes or 0)
        return held / self.total_bytes


class HostGauge:
    """The host's memory: this process's resident set against the machine's or container's limit."""

    name, place = "host", "cpu"

    def __init__(self, proc: Path = PROC, cgroup: Path = CGROUP) -> None:
        self._page_bytes = resource.getpagesize()
        self._proc = proc
        self._statm: int | None = None
        with suppress(OSError):
            self._statm = os.open(proc / "self/statm", os.O_RDONLY)
        self.total_bytes = host_bytes(proc, cgroup)

    def read(self, step: float) -> Reading:
        """Return the resident set; where the kernel does not tell, its peak so far."""
        if self._statm is not None:
            pages = int(os.pread(self._statm, 200, 0).split()[1])
            return Reading(step, pages * self._page_bytes, total_bytes=self.total_bytes)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return Reading(step, peak, total_bytes=self.total_bytes, high_water=True)

    def used_fraction(self, reading: Reading) -> float:
        """Return the part of the limit that this process takes."""
        return reading.allocated_bytes / self.total_bytes

    def __del__(self) -> None:
        if getattr(self, "_statm", None) is not None:
            os.close(self._statm)  # type: ignore[arg-type]


class BudgetGauge:
    """What a run's budget limits: bytes that CUDA's allocator reserves, or a ledger's on the host.

    Args:
        limit_bytes: the budget.
        device: whose tensors it limits.
        ledger: what enforces it; None on CUDA, where the allocator does.

    """

    name = BUDGET_NAME

    def __init__(
        self, limit_bytes: int, device: torch.device, ledger: BudgetLedger | None = None
    ) -> None:
        self.place = str(device)
        self.total_bytes = limit_bytes
        self.ledger = ledger
        self._card = CudaGauge(device) if ledger is None else None

    def read(self, step: float) -> Reading:
        """Return what counts towards the budget now."""
        if self._card is not None:
            card = self._card.read(step)
            return replace(card, other_bytes=None, total_bytes=self.total_bytes)
        assert self.ledger is not None
        held, peak = self.ledger.allocated_bytes, self.ledger.peak_bytes
        return Reading(step, held, peak_bytes=peak, total_bytes=self.total_bytes)

    def used_fraction(self, reading: Reading) -> float:
        """Return the part of the budget that is taken, 0 to 1."""
        held = reading.reserved_bytes
        return (reading.allocated_bytes if held is None else held) / self.total_bytes


def gauge_for(device: torch.device | str | None = None) -> Gauge:
    """Return the gauge of a device; without one, CUDA's current device if there is any.

    Raises:
        ValueError: a CUDA device was asked for and there is none.

    """
    if str(device) == "cpu":
        return HostGauge()
    import torch

    if device is None:
        if not torch.cuda.is_available():
            return HostGauge()
        return CudaGauge(torch.device("cuda", torch.cuda.current_device()))
    device = torch.device(device)
    if device.type != "cuda":
        return HostGauge()
    if not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch sees no CUDA device; give cpu or None")
    return CudaGauge(device)
