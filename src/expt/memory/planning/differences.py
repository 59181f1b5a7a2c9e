"""What differs from one traced step to the next: batches, depth, what is kept.

`Differences` notes for every step what it made and what it left alive. Equal steps need no more
than two; where a buffer grows, layers are left out at random or lengths vary, more are taken, and
the plan's interval and notes say so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

from expt.memory.measuring.in_place_sums import COUNTS_OWNERS
from expt.memory.planning.hybrid import HybridFakeMode
from expt.memory.planning.trace import StorageTrace, once_more

BATCHES = 4
"""Batches that are looked at without being run."""


@dataclass
class TakenStep:
    """One step of a trace: its events, what it made, and what it left."""

    first_event: int
    first_storage: int
    last_event: int
    made: int  # a hash of the sizes of all that forward and backward passes made
    left_bytes: int  # alive afterwards


@dataclass
class Kept:
    """Storages that a loop may hold from an event on."""

    kind: str
    event: int
    numbers: list[int]


@dataclass
class Differences:
    """Compares the steps of a trace while they are taken."""

    trace: StorageTrace
    fake: HybridFakeMode
    steps: list[TakenStep] = field(default_factory=list)
    outputs: list[Kept] = field(default_factory=list)
    batch_bytes: int = 0
    only_held_bytes: int = 0  # of a batch, what the backward pass does not need
    sequences: int = 0  # rows of integers in a batch: lines of tokens, whose length may vary
    draws: bool = False  # random numbers were drawn by code that may have decided on them
    batches_differ: bool = False
    _looked: bool = False

    def keep(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Note tensors that a loop may hold in a variable, until the next of their kind."""
        self.outputs.append(Kept(kind, len(self.trace.events), self.trace.numbers(tensors)))

    def note_batch(self, tensors: Iterable[Tensor], before: Sequence[object]) -> None:
        """Note how much of a batch is held by the loop alone: as `holders` were `before`."""
        every = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        self.batch_bytes = max(self.batch_bytes, sum(every.values()))
        alone = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor, same in zip(tensors, before, strict=True)
            if holders(tensor) == same
        }
        self.only_held_bytes = max(self.only_held_bytes, sum(alone.values()))

    def note_sequences(self, tensors: Iterable[Tensor]) -> None:
        """Note how many sequences of tokens a batch has."""
        for tensor in tensors:
            integers = not (tensor.is_floating_point() or tensor.is_complex())
            if integers and tensor.dim() == 2 and tensor.shape[1] > 1:
                self.sequences = max(self.sequences, tensor.shape[0])

    @property
    def count(self) -> int:
        """How many steps were taken."""
        return len(self.steps)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Note what is made inside."""
        trace = self.trace
        first, storage = len(trace.events), len(trace.storages)
        yield
        last = len(trace.events)
        made = self._made(first, last)
        self.steps.append(TakenStep(first, storage, last, made, trace.live_bytes()))

    def repeat_step(self) -> bool:
        """Enter the last step once more without taking it; tell whether that can be."""
        step, last = self.steps[-1], len(self.trace.events)
        first = step.first_event
        numbers = None if self.draws else self.trace.repeat(first, step.first_storage)
        if numbers is None:
            return False
        for kept in [kept for kept in self.outputs if kept.event >= first]:
            again = [numbers.get(number, number) for number in kept.numbers]
            before = sum(
                1 for event in self.trace.events[first : kept.event] if event[0] in numbers
            )
            self.outputs.append(Kept(kept.kind, last + before, again))
        end = len(self.trace.events)
        self.steps.append(replace(step, first_event=last, last_event=end))
        return True

    @property
    def alike(self) -> bool:
        """Tell whether the second of two steps is what `repeat_step` would have entered."""
        if not self._looked or self.count != 2 or self._differ:
            return False
        first, second = self.steps
        events, phases = self.trace.events, self.trace.phases
        again = once_more(events[first.first_event : first.last_event], first.first_storage)
        taken = events[second.first_event : second.last_event]
        return again is not None and [(c, phases[p]) for _, c, p in filter(None, again)] == [
            (c, phases[p]) for _, c, p in taken
        ]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Note whether the code inside may decide on random numbers."""
        state, reads = _random_state(), self.fake.reads
        yield
        now = _random_state()
        self.draws |= state[0] != now[0] or (state[1] != now[1] and self.fake.reads > reads)

    def found(self, batch_fn: Callable[[], Any]) -> bool:
        """Tell whether the last two steps differ, or the next may."""
        if not self._looked:
            self._looked = True
            self._look(batch_fn)
        return self._differ

    @property
    def _differ(self) -> bool:
        before, last = self.steps[-2:]
        return (
            self.draws
            or self.batches_differ
            or before.made != last.made
            or before.left_bytes != last.left_bytes
        )

    @property
    def reasons(self) -> tuple[bool, bool]:
        """Whether batches differ in shape, and whether random numbers decide."""
        return self.batches_differ, self.draws

    @property
    def growth_bytes(self) -> int:
        """What every step left more than the one before, at the end; 0 if nothing grows."""
        if len(self.steps) < 3:
            return 0
        left = [step.left_bytes for step in self.steps[-3:]]
        return left[2] - left[1] if left[0] < left[1] < left[2] else 0

    def _made(self, first: int, last: int) -> int:
        trace = self.trace
        return hash(
            tuple(
                change
                for _, change, phase in trace.events[first:last]
                if change > 0 and trace.phases[phase] in ("forward", "backward")
            )
        )

    def _look(self, batch_fn: Callable[[], Any]) -> None:
        """Compare the shapes of a few batches."""
        self.fake.in_batch = True
        try:
            with self.trace.paused():
                shapes = {_shapes(batch_fn()) for _ in range(BATCHES)}
        except Exception:
            return  # a loader came to its end
        finally:
            self.fake.in_batch = False
        self.batches_differ = len(shapes) > 1


def holders(tensor: Tensor) -> tuple[int, int]:
    """Count who holds a tensor in torch, and its storage."""
    owners = tensor._use_count() if COUNTS_OWNERS else 0  # type: ignore[attr-defined]
    return owners, torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _shapes(batch: Any) -> tuple[Any, ...]:
    if hasattr(batch, "__dataclass_fields__"):
        batch = vars(batch)
    return tuple(
        tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf) for leaf in tree_iter(batch)
    )


def _random_state() -> tuple[Any, Any]:
    """Return the state of Python's and NumPy's generators, and of torch's."""
    kind, keys, position, *_ = np.random.get_state()
    with _disable_current_modes():
        torchs = torch.get_rng_state().numpy().tobytes()
    return (random.getstate(), kind, np.asarray(keys).tobytes(), position), torchs
