"""`recover`: a training step of anybody's loop that survives running out of memory.

::

    @recover(model, optimizer)
    def train_step(batch, techniques):
        for part in batch.chunk(techniques.gradient_accumulation):
            (loss(model(part)) * len(part) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches:
        train_step(batch)

The step is given the techniques in force and has to split its batch as they say; it has to be
whole, from the forward pass to gradients set to None, so that it can be taken again. See
`expt.memory.recovery.recovery` for what happens, and docs/recovery.md for what is guaranteed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from expt.memory.recovery.event import OomEvent
from expt.memory.recovery.ladder import Apply
from expt.memory.recovery.limits import Limits
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques
from expt.memory.techniques.techniques import apply as apply_techniques

B = TypeVar("B")
T = TypeVar("T")


class RecoveredStep(Generic[B, T]):
    """A step function of a batch; `recovery` has the techniques in force and the events."""

    def __init__(
        self,
        function: Callable[[B, Techniques], T],
        recovery: Recovery,
        samples: Callable[[B], int],
    ) -> None:
        functools.update_wrapper(self, function)
        self.recovery = recovery
        self._function = function
        self._samples = samples
        self._steps = 0

    def __call__(self, batch: B) -> T:
        """Take the step.

        Raises:
            RecoveryError: nothing is left to try.
            BrokenStepError: the optimizer had begun to write; load a checkpoint and go on.

        """
        recovery = self.recovery
        recovery.position = (self._steps, 0)
        value = recovery.step(
            lambda own: self._function(own, recovery.techniques), batch, self._samples(batch)
        )
        self._steps += 1
        return value


def recover(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    techniques: Techniques | None = None,
    samples: Callable[[Any], int] = len,
    scaler: Any = None,
    limits: Limits | None = None,
    apply: Apply = apply_techniques,
    on_event: Callable[[OomEvent], None] = lambda event: print(event.line(), flush=True),
) -> Callable[[Callable[[B, Techniques], T]], RecoveredStep[B, T]]:
    """Return a decorator that makes a step function recover.

    Args:
        model: on its device, with `techniques` already on it.
        optimizer: the one that the step calls.
        techniques: those to begin with; None: none.
        samples: how many there are in a batch.
        scaler: a `torch.amp.GradScaler`, if the step uses one.
        limits: how often to recover.
        apply: puts techniques on the model.
        on_event: told of every event; by default it is printed.

    """
    weight = next(model.parameters(), torch.empty(0))
    recovery = Recovery(
        techniques or Techniques(), weight.device, apply=apply, limits=limits, on_event=on_event
    )
    recovery.attach(model, optimizer, scaler)
    return lambda function: RecoveredStep(function, recovery, samples)
