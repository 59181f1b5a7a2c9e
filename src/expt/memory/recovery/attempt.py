"""Trying something that may run out of memory, and tidying up after it.

Inside an `except` block the traceback keeps every frame of the failed work, and the frames keep
the tensors: memory released there is not released. `attempt` therefore only classifies, keeps
evidence and clears the frames in it, and hands back what happened as a value.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from expt.memory.recovery.shortage import OomFigures

T = TypeVar("T")


@dataclass(frozen=True)
class Success(Generic[T]):
    """The work was done."""

    value: T


@dataclass(frozen=True)
class Failure:
    """Memory ran out: the error's figures, and files that show what was held then."""

    figures: OomFigures
    evidence: tuple[Path, ...] = ()


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
