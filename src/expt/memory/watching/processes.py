"""The memory of any process, from outside: the host's by psutil, a card's by NVML.

A process's host memory is its resident set, which is what control groups and the out-of-memory
killer count. With children (loader workers, ranks) it is the sum of their proportional sets, in
which a page that several share counts once; where the system does not tell those of somebody
else's processes, resident sets are added, which count it for each. To tell proportional sets the
kernel goes through all pages of a process, so that they are read seldom where that takes long; in
between, what the resident sets have grown by is added.

NVML (package nvidia-ml-py, extra ``nvml``) says what each process holds on each card, context and
libraries included. Inside a container without the host's process numbers it finds none.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from expt.errors import ConfigError
from expt.memory.diagnosis.trend import Reading
from expt.memory.measuring.device_memory import CGROUP, PROC, host_bytes

DRIVER = Path("/proc/driver/nvidia/version")
"""Is there where NVIDIA's driver is."""
READING_SHARE = 0.02
"""Of the time, at most, for reading proportional sets, while the processes stay the same."""


class ProcessTree:
    """The host memory of a process and of all it has started; implements `Gauge`.

    Args:
        pid: the process.
        setting: what to call it in a message.

    Raises:
        ConfigError: there is no such process, or its memory may not be read.

    """

    name, place = "host", "cpu"

    def __init__(
        self, pid: int, setting: str = "pid", proc: Path = PROC, cgroup: Path = CGROUP
    ) -> None:
        import psutil

        self.pids = [pid]
        self.shared_once = True
        self._proportional: _Proportional | None = None
        try:
            self._process = psutil.Process(pid)
            self.started = float(self._process.create_time())
            self.command = " ".join(self._process.cmdline()) or self._process.name()
            self.total_bytes = host_bytes(proc, cgroup, str(pid))
            alive = self.look(0.0) is not None
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            alive = False
        except (psutil.AccessDenied, PermissionError) as error:
            raise ConfigError(
                f"{setting}={pid}: the process is somebody else's, and its memory may not be read"
            ) from error
        if not alive:
            raise ConfigError(f"{setting}={pid}: there is no such process; it may have ended")

    def look(self, step: float) -> Reading | None:
        """Return what is held now, None once the process has ended."""
        import psutil

        try:
            if self._process.status() == psutil.STATUS_ZOMBIE:
                return None
            family = [self._process, *self._process.children(recursive=True)]
            self.pids = [process.pid for process in family]
            held = self._held(family)
        except psutil.NoSuchProcess:
            return None
        return Reading(step, held, total_bytes=self.total_bytes)

    def _held(self, family: list[Any]) -> int:
        import psutil

        resident = int(family[0].memory_info().rss)  # of the process itself it must be readable
        if len(family) == 1:
            return resident
        for child in family[1:]:
            with suppress(psutil.Error):
                resident += int(child.memory_info().rss)
        if not self.shared_once:
            return resident
        known = self._proportional
        if known is None or known.pids != set(self.pids) or time.monotonic() >= known.until:
            try:
                known = self._proportional = _read_proportional(family, resident)
            except psutil.AccessDenied:
                self.shared_once = False
                return resident
        return min(max(known.bytes + resident - known.resident_bytes, 0), resident)


@dataclass(frozen=True)
class _Proportional:
    """The proportional sets of some processes, with their resident sets at that time."""

    pids: set[int]
    bytes: int
    resident_bytes: int
    until: float
    """When they may be read again."""


def _read_proportional(family: list[Any], resident_bytes: int) -> _Proportional:
    began = time.monotonic()
    count = sum(_proportional(process) for process in family)
    now = time.monotonic()
    until = now + (now - began) * (1 / READING_SHARE - 1)
    return _Proportional({process.pid for process in family}, count, resident_bytes, until)


def _proportional(process: Any) -> int:
    """Return a process's proportional set, where the system has one; 0 of one that has ended."""
    import psutil

    try:
        found = process.memory_full_info()
    except psutil.NoSuchProcess:
        return 0
    return int(getattr(found, "pss", 0) or found.rss)


class Cards:
    """What processes hold on NVIDIA's cards, by NVML.

    Args:
        nvml: the module `pynvml`.

    Raises:
        ConfigError: the driver does not answer.

    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
            self._cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except nvml.NVMLError as error:
            raise ConfigError(f"NVML does not answer: {error}") from error

    def look(self, step: float, pids: Collection[int]) -> dict[str, Reading]:
        """Return the cards that these processes are on, by ``gpu:NUMBER`` (in PCI order).

        `allocated_bytes` is what they hold, `other_bytes` the rest of what is in use. Where NVML
        does not tell a process's part (MIG, WSL), all is other.
        """
        found = {}
        for index, card in enumerate(self._cards):
            with suppress(self._nvml.NVMLError):
                rows = self._nvml.nvmlDeviceGetComputeRunningProcesses(card)
                own = [row.usedGpuMemory or 0 for row in rows if row.pid in pids]
                if not own:
                    continue
                memory = self._nvml.nvmlDeviceGetMemoryInfo(card)
                held, used = int(sum(own)), int(memory.used)
                other, total = max(used - held, 0), int(memory.total)
                found[f"gpu:{index}"] = Reading(step, held, None, other, None, total)
        return found


def find_cards(nvml: Any = None, driver: Path = DRIVER) -> tuple[Cards | None, str]:
    """Return the cards, or None and why there are no figures of any, in a sentence.

    Args:
        nvml: the module to ask instead of the installed `pynvml`.
        driver: a file that is there where the driver is.

    """
    if nvml is None:
        if not driver.exists():
            return None, "no figures of cards: there is no NVIDIA driver here"
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return None, "no figures of cards: pip install 'expt[nvml]' reads them by NVML"
    try:
        return Cards(nvml), ""
    except ConfigError as error:
        return None, f"no figures of cards: {error}"
