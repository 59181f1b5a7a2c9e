"""How full a device is now: CUDA by its allocator and driver, the host by the kernel's own files.

A gauge is cheap (tens of microseconds) and never allocates on the device.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from expt.memory.diagnosis.trend import Reading
from expt.memory.measuring.device_memory import CGROUP, PROC, host_bytes
from expt.units import format_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Gauge(Protocol):
    """Reads one device."""

    name: str
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
        self.name = str(device)
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

    name = "host"

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


class Alarm:
    """Warns when a device becomes fuller than a part of it; again only after it was emptier.

    Args:
        part: of the device's memory, 0 to 1.
        callback: also called then, with the device's name and the part in use.

    """

    def __init__(self, part: float, callback: Callable[[str, float], object] | None = None) -> None:
        self._part = part
        self._callback = callback
        self._ringing: set[str] = set()

    def hear(self, gauge: Gauge, used: float) -> None:
        """Take note of how full a device is."""
        if used <= self._part:
            self._ringing.discard(gauge.name)
        elif gauge.name not in self._ringing:
            self._ringing.add(gauge.name)
            total = format_bytes(gauge.total_bytes)
            log.warning("memory of %s: %.0f %% of %s in use", gauge.name, 100 * used, total)
            if self._callback is not None:
                self._callback(gauge.name, used)
