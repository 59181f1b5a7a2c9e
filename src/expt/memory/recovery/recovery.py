"""Recovery from a lack of memory: the same work again, one rung down, and nothing lost.

When a step fails, memory is released, what the step had changed is put back (module `undo`), the
next rung of the `ladder` is put on the model, and the same step is taken again: same batch, same
random numbers, same effective batch. All of it happens after the `except` block (`attempt`).

`recover`, in `expt.memory.recovery.decorator`, is this for any training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from expt.errors import BrokenStepError, RecoveryError
from expt.memory.recovery.attempt import (
    Failure,
    OomFigures,
    Shortage,
    Success,
    attempt,
    release,
    shortage,
)
from expt.memory.recovery.event import PHASES, THRASHING, OomEvent
from expt.memory.recovery.ladder import Apply, LadderState, Move, Predict
from expt.memory.recovery.limits import ONCE, Attempts, Limits, Thrashing, retries
from expt.memory.recovery.peers import Alone, Peers
from expt.memory.recovery.undo import RandomState, StepUndo
from expt.memory.techniques.batch_norm import batch_statistics
from expt.memory.techniques.techniques import Techniques

S = TypeVar("S")
T = TypeVar("T")
NOTHING = Move(None, None, ())
RETRIES = Shortage("allocation_retries", None, None)


class Recovery:
    """Runs work, and runs it again one rung down when memory ran out.

    Args:
        techniques: those to begin with.
        device: where the work runs.
        apply: see `expt.memory.recovery.ladder.Apply`.
        limits: see `expt.memory.recovery.limits`.
        budget_bytes: recorded with every event.
        predict: peak in bytes with other techniques, to skip rungs that will not help.
        classify: returns the figures of a lack of memory, None for any other error.
        on_event: called with every event, before the work is done again.
        collect: called with an event's number, from 1, while the failed work's tensors are
            alive; returns files that show what was held.

    """

    def __init__(
        self,
        techniques: Techniques,
        device: torch.device,
        *,
        apply: Apply | None = None,
        limits: Limits | None = None,
        budget_bytes: int | None = None,
        predict: Predict = lambda techniques: None,
        classify: Callable[[BaseException], OomFigures | None] = shortage,
        on_event: Callable[[OomEvent], None] = lambda event: None,
        collect: Callable[[int], list[Path]] = lambda number: [],
    ) -> None:
        self.ladder = LadderState(techniques, device.type, apply, predict)
        self.device = device
        self.limits = limits or Limits()
        self.budget_bytes = budget_bytes
        self.on_event = on_event
        self.collect = collect
        self.events: list[Mapping[str, Any]] = []
        self.evaluation_batch_size: int | None = None
        """The largest batch that evaluation takes, once memory ran out there."""
        self.phase = "step"
        """What is under way; a step function may say so."""
        self.alone = False
        """Whether other processes know nothing of it, as they do of a step."""
        self.position = (0, 0)
        """Optimizer step and epoch under way, for the record."""
        self.give_way: Callable[[], bool] = lambda: False
        """Gives back memory that only makes steps faster; returns whether there was any."""
        self.over_the_batch = False
        """Whether layers normalise over the samples of a forward pass."""
        self.peers: Peers = Alone()
        """The processes that take every step together with this one."""
        self.classify = classify
        self._undo: StepUndo | None = None
        self._step_attempts, self._failed_step = Attempts(), -1
        self._evaluation_attempts = Attempts()
        self._loop_attempts, self._failed_between = Attempts(), -1
        self._thrashing = Thrashing(partial(retries, device)) if device.type == "cuda" else None

    @property
    def techniques(self) -> Techniques:
        """The techniques in force."""
        return self.ladder.techniques

    def attach(self, model: nn.Module, optimizer: Optimizer, scaler: Any = None) -> None:
        """Take charge of a model that has the techniques, its optimizer, and fp16's scaler."""
        self.ladder.attach(model, optimizer)
        self.over_the_batch = bool(batch_statistics(model))
        self._undo = StepUndo(model, optimizer, self.device, scaler)

    def set_parts(self, parts: int) -> None:
        """Cut the batch of a step into another number of parts, from the next step on."""
        self.ladder.techniques = replace(self.techniques, gradient_accumulation=parts)

    def step(self, work: Callable[[S], T], batch: S, samples: int, undo: bool = True) -> T:
        """Do one optimizer step, as often as it needs; return what `work` returns.

        Args:
            work: the whole step on `batch`: forward and backward passes, the optimizer's step,
                gradients to None. It reads `techniques` each time it is called.
            batch: handed to `work` every time.
            samples: in the batch, or in a full one where this is an epoch's smaller last.
            undo: note what has to be put back; without it, a step that fails is a broken one.

        Raises:
            RecoveryError: nothing is left to try.
            BrokenStepError: the optimizer had begun to write.

        """
        assert self._undo is not None, "attach a model first"
        if undo:
            self._undo.note()
        if self.position[0] > self._failed_step:  # a broken step goes on counting when replayed
            self._step_attempts = Attempts()
        attempts = self._step_attempts
        while True:
            self.phase, self.alone = "step", False
            self.peers.begin()
            outcome = attempt(partial(work, batch), self.classify, self.evidence)
            self.phase = self._undo.phase(self.phase)
            outcome = self.peers.settle(outcome, self.phase)
            if isinstance(outcome, Success):
                self._watch_thrashing(samples)
                return outcome.value
            attempts.failures += 1
            whole = self.peers.every(undo and self._undo.undo(self.phase))
            self.phase = outcome.phase or self.phase
            release(self.device)
            self._failed_step = max(self._failed_step, self.position[0])
            self._go_down(outcome, attempts, samples, replayed=not whole)
            if not whole:
                raise BrokenStepError(
                    f"{self._where()} the optimizer had written part of the weights; load the "
                    "last checkpoint and go on from there"
                )

    def between_steps(self, failure: Failure, samples: int) -> None:
        """Prepare for going back to a checkpoint: memory ran out outside of a step.

        Args:
            failure: what was caught around a whole epoch (`attempt`).
            samples: in the batch of a step.

        Raises:
            RecoveryError: nothing is left to try.

        """
        release(self.device)
        self.phase, self.alone = "loop", True
        if self.position[0] > self._failed_between:
            self._loop_attempts, self._failed_between = Attempts(), self.position[0]
        self._loop_attempts.failures += 1
        self._go_down(failure, self._loop_attempts, samples, replayed=True)

    def evaluation(self, work: Callable[[int], object], batch_size: int) -> bool:
        """Do one batch of evaluation; return False if it has to be asked for again, smaller.

        Args:
            work: takes the number of samples to do.
            batch_size: samples wanted; it gets fewer once memory ran out.

        Raises:
            RecoveryError: not even a single sample can be evaluated.

        """
        size = min(batch_size, self.evaluation_batch_size or batch_size)
        before, attempts = RandomState(self.device), self._evaluation_attempts
        outcome = self._attempt(lambda: work(size), "evaluation", attempts)
        if isinstance(outcome, Success):
            return True
        before.restore()
        release(self.device)
        reason = self.limits.forbid(attempts, self.events)
        move = NOTHING
        if reason is None and self.give_way():
            move = Move("eager", self.techniques, ())
        elif size > 1 and reason is None:
            self.evaluation_batch_size = -(-size // 2)
            move = Move("halve_evaluation_batch", self.techniques, ())
        elif reason is None:
            single = "it is a single sample already"
            move = attempts.release_only(self.techniques, "halve_evaluation_batch", single)
        self._record(outcome, move, reason)
        return False

    def evaluated(self) -> None:
        """Note that a whole evaluation is done: what failed in it is forgotten."""
        self._evaluation_attempts = Attempts()

    def capture(self, work: Callable[[], T], reset: Callable[[], None]) -> T | None:
        """Do work that only makes later steps faster; None if there is no memory for it.

        Args:
            work: may leave the allocator in a state in which nothing can be released.
            reset: brings it out of that; called unless torch's own allocator said that memory ran
                out, in which case the work was ended as it should.

        """
        cleanly = False

        def watched() -> T:
            nonlocal cleanly
            try:
                return work()
            except Exception as error:
                cleanly = isinstance(error, torch.OutOfMemoryError)
                if self._undo is not None:
                    self._undo.watch.reset()  # what is only captured writes nothing
                raise

        outcome = self._attempt(watched, "capture", Attempts())
        if isinstance(outcome, Success):
            return outcome.value
        if not cleanly:
            reset()
        release(self.device)
        self.phase = "capture"
        self._record(outcome, Move("eager", self.techniques, ()), None)
        return None

    def retry_once(self, work: Callable[[], T], phase: str) -> T:
        """Do work on which no rung acts (building, loading); a second time if memory ran out.

        Raises:
            RecoveryError: it ran out again.

        """
        attempts = Attempts(releases=ONCE)  # a lack of memory here is rarely by chance
        while True:
            outcome = self._attempt(work, phase, attempts)
            if isinstance(outcome, Success):
                return outcome.value
            release(self.device)
            reason = self.limits.forbid(attempts, self.events)
            move = NOTHING
            if reason is None:
                move = attempts.release_only(self.techniques, "ladder", "its rungs act on steps")
            self._record(outcome, move, reason)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain values."""
        return {
            **self.ladder.state(),
            "evaluation_batch_size": self.evaluation_batch_size,
            "events": [dict(event) for event in self.events],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another process saved a checkpoint; its events come before ours."""
        if not state:
            return  # a checkpoint from before there was recovery
        self.ladder.restore(state)
        self.evaluation_batch_size = state["evaluation_batch_size"]
        self.events = [*state["events"], *self.events]

    def evidence(self) -> list[Path]:
        """Write what is held now; call it while the failed work's tensors are alive."""
        return self.collect(len(self.events) + 1)

    def _attempt(
        self, work: Callable[[], T], phase: str, attempts: Attempts
    ) -> Success[T] | Failure:
        self.phase, self.alone = phase, True
        outcome = attempt(work, self.classify, self.evidence)
        attempts.failures += isinstance(outcome, Failure)
        return outcome

    def _go_down(self, failure: Failure, attempts: Attempts, samples: int, replayed: bool) -> None:
        """Go one rung down after a step failed, and enter it; raise RecoveryError if none is."""

        def decide() -> tuple[str | None, Move]:
            forbidden = self.limits.forbid(attempts, self.events)
            return forbidden, NOTHING if forbidden else self._down(samples, attempts)

        reason, move = self.peers.first(decide)
        if move.techniques is not self.techniques:
            self.ladder.follow(move)  # another process decided
        attempts.releases += move.rung == "release"
        cut = move.rung == "halve_micro_batch" and self.over_the_batch
        parts = self.techniques.gradient_accumulation
        self._record(failure, move, reason, replayed, -(-samples // parts) if cut else None)

    def _down(self, samples: int, attempts: Attempts) -> Move:
        """Give up what only makes steps faster, if there is any, or go one rung down."""
        if self.give_way():
            return Move("eager", self.techniques, ())
        # A precaution may not change what is computed.
        whole_batch = self.phase == THRASHING and self.over_the_batch
        return self.ladder.down(self.phase, samples, attempts.releases, whole_batch)

    def _record(
        self,
        failure: Failure,
        move: Move,
        reason: str | None,
        replayed: bool = False,
        samples_per_statistic: int | None = None,
    ) -> None:
        """Enter what happened; raise RecoveryError if nothing was, or could be, done."""
        if reason is None and move.techniques is None:
            tried = "; ".join(f"{skipped.rung}: {skipped.reason}" for skipped in move.skipped)
            reason = f"nothing is left to try ({tried})"
        event = OomEvent.of(
            self.phase,
            self.position,
            failure,
            move,
            self.techniques,
            budget_bytes=self.budget_bytes,
            evaluation_batch_size=self.evaluation_batch_size,
            replayed=replayed and reason is None,
            samples_per_statistic=samples_per_statistic,
        )
        self.events.append(event.as_dict())
        self.on_event(event)
        if reason is not None:
            raise RecoveryError(f"{self._where()} {reason}")

    def _where(self) -> str:
        return f"memory ran out {PHASES[self.phase]} (step {self.position[0]}), and"

    def _watch_thrashing(self, samples: int) -> None:
        """Go one rung down before memory runs out, if the allocator retries all the time."""
        if self._thrashing is None or not self.peers.alone or not self._thrashing.after_step():
            return  # what one allocator sees is no reason for all processes to change
        if not self.limits.allow_thrashing(self.events):
            return
        self.phase = THRASHING
        release(self.device)
        self._record(Failure(RETRIES), self._down(samples, Attempts()), None)
