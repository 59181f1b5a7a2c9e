"""Steps executed operator by operator, and again with a technique that saves if memory runs out.

`expt.training.steps.captured` replays a captured step, `expt.training.steps.compiled` runs the
model's forward and backward passes as `torch.compile` makes them. Both give the same results to
rounding, and fall back to these steps, with a line that says why, when something cannot be done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from expt.memory.recovery.recovery import Recovery
from expt.training.batches import Samples

StepFunction = Callable[[Samples], tuple[Tensor, Tensor]]
"""Does one whole step on some samples; returns its mean loss and its weight, on the device."""


class Steps:
    """Executes every step operator by operator, and again if memory runs out."""

    def __init__(self, function: StepFunction, recovery: Recovery) -> None:
        self.function = function
        self.recovery = recovery

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Do a step; the loss and weight are valid until the next one.

        Raises:
            RecoveryError: nothing is left to try.
            BrokenStepError: the optimizer had begun to write.

        """
        return self.recovery.step(partial(self.function, samples), len(samples))

    def forget(self) -> None:
        """Keep nothing that refers to optimizer state, which has just been replaced."""
