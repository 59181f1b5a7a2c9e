"""Trying something that may run out of memory, and tidying up after it.

Inside an `except` block the traceback keeps every frame of the failed work, and the frames keep
the tensors: memory released there is not released. `attempt` therefore only classifies, keeps
evidence and clears the frames in it, and hands back what happened as a value.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from expt.memory.diagnosis.oom import classify_oom
from expt.memory.diagnosis.oom_figures import likely_cause, read_figures
from expt.memory.recovery.peers import PeerShortageError


class OomFigures(Protocol):
    """What recovery wants to know of an out-of-memory error; None where it is not said."""

    @property
    def cause(self) -> str:
        """Why the allocation failed."""

    @property
    def bytes_requested(self) -> int | None:
        """What was asked for."""

    @property
    def bytes_free(self) -> int | None:
        """What was left."""


@dataclass(frozen=True)
class Shortage:
    """The figures of one error; implements `OomFigures`."""

    cause: str
    bytes_requested: int | None
    bytes_free: int | None


def shortage(error: BaseException) -> OomFigures | None:
    """Return the figures of an out-of-memory error of torch, Python or a library, else None."""
    if isinstance(error, PeerShortageError):
        return Shortage("unknown", None, None)  # whoever met it knows more
    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        # Libraries and the host's allocator raise what could be anything but for its words.
        return classify_oom(error) if isinstance(error, RuntimeError) else None
    figures = read_figures(str(error))
    cause = likely_cause(figures)
    if cause == "unknown" and not isinstance(error, MemoryError):
        cause = "full"
    return Shortage(cause, figures.requested_bytes, figures.free_bytes)


T = TypeVar("T")


@dataclass(frozen=True)
class Success(Generic[T]):
    """The work was done."""

    value: T


@dataclass(frozen=True)
class Failure:
    """Memory ran out: the error's figures, and files that show what was held then.

    Where several processes train together: the `rank` of the one that it happened in, and the
    `phase` that it was in.
    """

    figures: OomFigures
    evidence: tuple[Path, ...] = ()
    rank: int | None = None
    phase: str | None = None


def attempt(
    work: Callable[[], T],
    classify: Callable[[BaseException], OomFigures | None],
    collect: Callable[[], list[Path]] = list,
) -> Success[T] | Failure:
    """Do `work`; an error that is a lack of memory is returned, any other is raised.

    Args:
        work: takes and keeps nothing; its frames do not outlive this call.
        classify: returns the figures of a lack of memory, None for any other error.
        collect: called while the failed work's tensors are alive; returns files it wrote.

    """
    try:
        return Success(work())
    except Exception as error:
        figures = classify(error)
        if figures is None:
            raise
        evidence = tuple(collect())
        _clear_frames(error)
    return Failure(figures, evidence)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more; call it outside any `except` block."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _clear_frames(error: BaseException) -> None:
    """Forget the local variables of every frame that the error, or its causes, came through."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


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
