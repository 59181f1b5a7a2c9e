"""Thrashing: the CUDA allocator finds room only by giving back all it holds, step after step.

Each such retry frees cached blocks and asks the driver again (`num_alloc_retries` in
`torch.cuda.memory_stats`), which waits for the device: a run so close to its limit is slow, and
the next larger batch ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EVERY_STEPS = 10
"""Steps between two looks, since reading the allocator's statistics takes about 0.1 ms."""
LOOKS = 3
"""Looks in a row that must each show more retries than the one before."""


def retries(device: torch.device) -> int:
    """Return how often the allocator of a CUDA device has had to try again."""
    import torch

    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


class Thrashing:
    """Judges a counter of retries; `retries` reads it."""

    def __init__(self, retries: Callable[[], int]) -> None:
        self._retries = retries
        self._steps = 0
        self._last: int | None = None
        self._grown = 0

    def after_step(self) -> bool:
        """Look when it is time to; return whether the counter grew `LOOKS` times in a row."""
        self._steps += 1
        if self._steps % EVERY_STEPS:
            return False
        count = self._retries()
        grew = self._last is not None and count > self._last
        self._last = count
        self._grown = self._grown + 1 if grew else 0
        if self._grown < LOOKS:
            return False
        self._grown = 0
        return True
