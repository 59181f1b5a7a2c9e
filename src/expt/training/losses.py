"""The loss of now and then, read without making the host wait for the device.

The host runs many steps ahead of a GPU. Reading a value would make it wait until all of them are
done and leave the GPU idle afterwards; so the value is copied when its turn comes, and looked at
when the copy has arrived.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """Tells when a copy is there; a `torch.cuda.Event` fits."""

    def query(self) -> bool:
        """Return whether it is there, without waiting."""

    def synchronize(self) -> None:
        """Wait until it is."""


Fetch = Callable[[Tensor], tuple[Tensor, Arrival]]
"""Begins to copy a tensor to the host; returns the copy, and when it is there."""


@dataclass(frozen=True)
class Reading:
    """The loss of an optimizer step, and whether all losses of the epoch so far were finite."""

    step: int
    loss: float
    finite: bool


MOST_PENDING = 2
"""Losses on their way before the host waits; on CUDA one is asked for every few dozen steps."""


class LossReader:
    """Reads losses from `device`, in the order in which they were asked for.

    With `in_step`, what is read after which step does not depend on how fast the device is, so
    that several processes see the same.
    """

    def __init__(
        self, device: torch.device, fetch: Fetch | None = None, in_step: bool = False
    ) -> None:
        self._in_step = in_step
        self._fetch = fetch or (fetch_from_cuda if device.type == "cuda" else fetch_at_once)
        self._pending: deque[tuple[int, Tensor, Arrival]] = deque()

    def ask(self, step: int, loss: Tensor, loss_sum: Tensor) -> None:
        """Ask for a step's loss and the sum of the epoch's, scalars on the device."""
        values = torch.stack((loss.detach().float(), loss_sum.detach().float()))
        self._pending.append((step, *self._fetch(values)))

    def readings(self, wait: bool = False) -> list[Reading]:
        """Return what has arrived since the last call; with `wait`, all that was asked for.

        Waits for the oldest while more than `MOST_PENDING` are on their way, so that the host is
        never so far ahead that a signal or a time limit is obeyed late.
        """
        found = []
        while self._pending:
            step, copy, arrival = self._pending[0]
            if wait or len(self._pending) > MOST_PENDING:
                arrival.synchronize()
            elif self._in_step or not arrival.query():
                break
            self._pending.popleft()
            loss, loss_sum = copy.tolist()
            found.append(Reading(step, loss, math.isfinite(loss_sum)))
        return found

    def forget(self) -> None:
        """Drop what has not arrived: the steps it is of are taken again."""
        self._pending.clear()


class Ready:
    """The arrival of what is there already."""

    def query(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Do not wait."""


def fetch_at_once(tensor: Tensor) -> tuple[Tensor, Arrival]:
    """Return the values of a tensor that is on the host, or on a device that has no events."""
    return tensor.cpu(), Ready()


def fetch_from_cuda(tensor: Tensor) -> tuple[Tensor, Arrival]:
    """Begin a copy into pinned memory behind what the device was given so far."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))
    return copy, done
