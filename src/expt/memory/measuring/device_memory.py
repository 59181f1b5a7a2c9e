"""How much memory a device has and how much of it is free, whoever uses the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""A limit of cgroup version 1 that is none."""


def device_type(name: str) -> str:
    """Return the type of device that `trainer.device` means on this machine.

    ``auto`` is CUDA or MPS where there is one, else the CPU.
    """
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def planned_type(name: str) -> Literal["cuda", "cpu"]:
    """Return what a run here is planned and limited as: its memory is CUDA's or the host's."""
    return "cuda" if device_type(name) == "cuda" else "cpu"


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device: the card's, or the host's within its container's limit."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_bytes()


def free_bytes(device: torch.device) -> int:
    """Return what tensors could still get now, what they have already included.

    On CUDA that is what the driver has free and what the caching allocator holds; a context that
    did not exist before is made, so that it is not counted as free.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device))
    return min([host_bytes(), *_available()])


def host_bytes(proc: Path | None = None, cgroup: Path | None = None, process: str = "self") -> int:
    """Return the machine's memory, or the limit of a process's container where that is lower."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (limit for limit, _ in _groups(proc or PROC, cgroup or CGROUP, process))
    return min([machine, *limits])


def _available() -> Iterator[int]:
    """Yield what the kernel and the control groups say is left."""
    with suppress(OSError, ValueError, IndexError):
        lines = (PROC / "meminfo").read_text().splitlines()
        found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        if "MemAvailable" in found:
            yield int(found["MemAvailable"].split()[0]) * 1024
    for limit, usage in _groups(PROC, CGROUP):
        with suppress(OSError, ValueError):
            yield max(limit - int(usage.read_text()), 0)


def _groups(proc: Path, cgroup: Path, process: str = "self") -> Iterator[tuple[int, Path]]:
    """Yield limit in bytes and file of what is used, of every control group that has a limit.

    In a container the root is its own group. Elsewhere the whole hierarchy is there, and
    ``PROCESS/cgroup`` says where the process stands in it (control groups version 2); the groups
    above it limit it too, as a batch system's job does its steps.
    """
    folders = [cgroup]
    with suppress(OSError):
        own = (proc / process / "cgroup").read_text().strip().rpartition("::/")[2]
        parts = Path(own).parts
        folders += [cgroup.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    pairs = [(folder / "memory.max", folder / "memory.current") for folder in folders]
    first = cgroup / "memory"
    pairs.append((first / "memory.limit_in_bytes", first / "memory.usage_in_bytes"))
    for limit, used in pairs:
        with suppress(OSError, ValueError):  # no such file, or "max"
            count = int(limit.read_text())
            if 0 < count < UNLIMITED:
                yield count, used
