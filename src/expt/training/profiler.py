"""What the training loop tells a profiler: the phase of a step, and what it is given.

`expt.training.trace_profiler` has the one of `debug=profile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.config.schema import Compile
from expt.memory.measuring.meter import MemoryMeter

NOWHERE: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Watched:
    """What there is while a run trains."""

    device: torch.device
    model: nn.Module
    optimizer: Optimizer
    meter: MemoryMeter
    averages: Callable[[], Iterable[Tensor]] = tuple
    """Returns the averaged weights."""
    resident: Callable[[], Iterable[Tensor]] = tuple
    """Returns the data that stay on the device."""


class StepProfiler:
    """Does nothing; what a run without profiling gets."""

    files: Sequence[Path] = ()
    """What was written."""

    def compile(self, how: Compile, device: torch.device) -> Compile:
        """Return how steps are to be taken, where `how` is asked for."""
        return how

    def begin(self, watched: Watched) -> None:
        """Say that training begins."""

    def take_in(self, tensors: Sequence[Tensor]) -> None:
        """Say that a step begins, and what others made for it, such as samples from workers."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Say which phase of a step runs inside: one of `expt.memory.measuring.timeline.PHASES`."""
        return NOWHERE

    def step(self) -> None:
        """Say that an optimizer step is over."""

    def stop(self) -> None:
        """Say that training is over."""
