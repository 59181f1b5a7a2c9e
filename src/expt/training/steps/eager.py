"""What a step is: a function of samples; executed operator by operator unless something is faster.

`expt.training.steps.captured` replays a captured step, `expt.training.steps.compiled` runs the
model's forward and backward passes as `torch.compile` makes them. Both give the same results to
rounding, and fall back to the plain function, with a line that says why, when something cannot be
done. Recovery is not their affair: the trainer calls them through `Recovery.step`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from expt.training.batches import Samples


class StepFunction(Protocol):
    """Does one whole step on some samples."""

    def __call__(self, samples: Samples, /) -> tuple[Tensor, Tensor]:
        """Return the step's mean loss and its weight, on the device, valid until the next step."""


class Steps:
    """How a run's steps are executed: `run` does one, here operator by operator."""

    def __init__(self, function: StepFunction) -> None:
        self.run = function

    def replays(self, samples: Samples) -> bool:
        """Tell whether a step on these samples allocates nothing, so that none has to be undone."""
        return False

    def forget(self) -> None:
        """Keep nothing that refers to optimizer state, which has just been replaced."""
