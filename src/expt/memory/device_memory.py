"""How much memory a device has and how much of it is free, whoever uses the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


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


def host_bytes() -> int:
    """Return the machine's memory, or the container's limit where that is lower."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in _container())])


def _available() -> Iterator[int]:
    """Yield what the kernel and the container say is left."""
    with suppress(OSError, ValueError, IndexError):
        lines = (PROC / "meminfo").read_text().splitlines()
        found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        if "MemAvailable" in found:
            yield int(found["MemAvailable"].split()[0]) * 1024
    yield from (max(limit - used, 0) for limit, used in _container())


def _container() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of the control group, version 2 or 1; nothing without one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            yield int((CGROUP / limit).read_text()), int((CGROUP / used).read_text())
