"""What is kept of a CUDA device that ran out of memory: a snapshot and a table, as files.

The snapshot can be looked at on https://pytorch.org/memory_viz; it says which code allocated a
block if `torch.cuda.memory._record_memory_history()` was called before.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

log = logging.getLogger(__name__)

MAX_SNAPSHOTS = 3
"""Later ones of a run show the same and cost the same space."""


def collect(device: torch.device, folder: Path, number: int) -> list[Path]:
    """Write what the allocator holds now; call it while the failed step's tensors are alive.

    Args:
        device: where memory ran out; there is nothing to write but for CUDA.
        folder: where to write; it is made.
        number: of the event, from 1; none are written after `MAX_SNAPSHOTS`.

    Returns:
        the files; none if they could not be written, since that must not end a run.

    """
    if device.type != "cuda" or number > MAX_SNAPSHOTS:
        return []
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / f"oom-{number}.txt"
        table.write_text(torch.cuda.memory_summary(device), encoding="utf-8")
        written.append(table)
        snapshot = folder / f"oom-{number}.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
        written.append(snapshot)
    except (OSError, RuntimeError, AttributeError) as error:
        log.warning("no memory snapshot: %s", error)
    return written
