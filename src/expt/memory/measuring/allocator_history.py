"""The history of CUDA's caching allocator over some steps, with stacks, for pytorch.org/memory_viz.

It shows segments and fragmentation, which a timeline of bytes cannot. Recorded by functions of
torch that are private by name and documented all the same ("Understanding CUDA Memory Usage").
"""

from __future__ import annotations

from pathlib import Path

import torch

from expt.files import replace_atomically

MOST_ENTRIES = 100_000
"""Allocations and releases that are kept, a few KB each; of more, the last ones."""


class AllocatorHistory:
    """Nothing to record: what a device without a caching allocator gets."""

    def start(self) -> None:
        """Begin to record."""

    def write(self, path: Path) -> list[Path]:
        """Write what was recorded and record no more; return the files that there are."""
        return []


class CudaAllocatorHistory(AllocatorHistory):
    """Records every allocation and release with its stack."""

    def start(self) -> None:
        """Begin to record."""
        torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES)

    def write(self, path: Path) -> list[Path]:
        """Write a pickle of segments, blocks and history, and record no more."""

        def dump(temporary: Path) -> None:
            torch.cuda.memory._dump_snapshot(str(temporary))

        try:
            replace_atomically(path, dump, durable=False)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        return [path]


def history_of(device: torch.device) -> AllocatorHistory:
    """Return what records the history of a device's allocator."""
    return CudaAllocatorHistory() if device.type == "cuda" else AllocatorHistory()
