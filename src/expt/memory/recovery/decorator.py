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

A batch is a tensor, or tuples, lists and dicts with tensors in them, as a DataLoader gives; what
counts the samples of any other is given as `samples`. The step is given the techniques in force
and has to split its batch as they say; it has to be whole, from the forward pass to gradients set
to None, so that it can be taken again. See `expt.memory.recovery.recovery` for what happens, and
docs/recovery.md for what is guaranteed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from expt.errors import ConfigError
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
    samples: Callable[[Any], int] | None = None,
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
        samples: how many there are in a batch; None: see `count_samples`.
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
    return lambda function: RecoveredStep(function, recovery, samples or count_samples)


def count_samples(batch: Any) -> int:
    """Return the length of the first tensor in a batch, in nested tuples, lists and dicts too.

    A tensor without dimensions is passed over. What holds no tensor is as long as it says.

    Raises:
        ConfigError: the batch does not say how many samples it has.

    """
    for part in _arrays(batch):
        return int(part.batch_sizes[0]) if isinstance(part, PackedSequence) else len(part)
    kind = type(batch).__name__
    if isinstance(batch, Mapping) or any(isinstance(p, tuple | list | Mapping) for p in _in(batch)):
        found = f"a {kind} without a tensor in it"
    else:
        try:
            return len(batch)
        except TypeError:
            found = f"a {kind}, which has no length"
    raise ConfigError(
        f"recover cannot tell how many samples are in the batch: it is {found}; say so, "
        "@recover(model, optimizer, samples=lambda batch: …)"
    )


def _arrays(batch: Any) -> Iterator[Any]:
    """Give the tensors (and NumPy's arrays) in a batch, depth first, but for single numbers."""
    if isinstance(batch, PackedSequence) or (hasattr(batch, "shape") and hasattr(batch, "ndim")):
        if isinstance(batch, PackedSequence) or batch.ndim:
            yield batch
    else:
        for part in _in(batch):
            yield from _arrays(part)


def _in(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        yield from batch.values()
    elif isinstance(batch, tuple | list):
        yield from batch
