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

Take = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes one whole step on samples [B]; returns its mean loss and its weight, on the device."""


class Steps:
    """Takes every step operator by operator, and again if memory runs out."""

    def __init__(self, take: Take, recovery: Recovery) -> None:
        self.take = take
        self.recovery = recovery

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step on samples [B]; the loss and weight are valid until the next one.

        Raises:
            RecoveryError: nothing is left to try.
            BrokenStepError: the optimizer had begun to write.

        """
        return self.recovery.step(partial(self.take, indices), len(indices))

    def forget(self) -> None:
        """Keep nothing that refers to optimizer state, which has just been replaced."""
