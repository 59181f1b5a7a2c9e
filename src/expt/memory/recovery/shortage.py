"""What an error says about a lack of memory, if that is what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from expt.memory.diagnosis.oom import classify_oom
from expt.memory.diagnosis.oom_figures import likely_cause, read_figures


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
    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        # Libraries and the host's allocator raise what could be anything but for its words.
        return classify_oom(error) if isinstance(error, RuntimeError) else None
    figures = read_figures(str(error))
    cause = likely_cause(figures)
    if cause == "unknown" and not isinstance(error, MemoryError):
        cause = "full"
    return Shortage(cause, figures.requested_bytes, figures.free_bytes)
