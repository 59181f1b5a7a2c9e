"""What an error says about a lack of memory, if that is what it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch

from expt.memory.oom import classify_oom
from expt.units import parse_bytes

_AMOUNT = r"(\d+(?:\.\d+)?\s*(?:bytes|[KMGT]iB))"


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
    text = str(error)
    return Shortage(
        "unknown" if isinstance(error, MemoryError) else "full",
        _amount(rf"[Tt]ried to allocate {_AMOUNT}", text),
        _amount(rf"{_AMOUNT} is free", text),
    )


def _amount(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return None if found is None else parse_bytes(found[1].replace(" bytes", ""))
