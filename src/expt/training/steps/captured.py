"""Steps that are captured once and replayed: one launch instead of hundreds, on CUDA.

Small models are bound by launching kernels, not by running them. Here the first steps are done
eagerly (they are steps like any other, so that nothing is computed only to warm up), the last of
them watched for what a capture forbids; then one step is captured without being run, and it and
all later ones of the same size are replayed. The samples' indices and the learning rates are
tensors that every replay reads; the last, smaller batch of an epoch is done eagerly.

A captured step keeps its memory to itself. When memory is short, it is the first to go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from expt.errors import UserError, first_line
from expt.memory.recovery.attempt import release, shortage
from expt.memory.recovery.recovery import Recovery
from expt.memory.recovery.undo import RandomState
from expt.memory.techniques.block_randomness import BlockCounter, block_randomness
from expt.memory.techniques.techniques import Techniques
from expt.memory.techniques.wrapping import bare_optimizer
from expt.training.batches import ResidentSamples, Samples
from expt.training.steps.cuda_graph import why_not_captured
from expt.training.steps.eager import StepFunction, Steps

WARM_STEPS = 3
"""Steps before the capture: optimizer state and library workspaces are made in the first; the CPU's
ledger watches as many (`expt.memory.measuring.meter.LEDGER_STEPS`)."""


NO_ROOM = "not enough memory to capture it; set trainer.compile=off to skip the attempt"


class Machinery(Protocol):
    """What captures and replays; `expt.training.steps.cuda_graph.CudaGraphs` on CUDA."""

    def warming(self, found: list[str] | None) -> AbstractContextManager[object]:
        """Run an eager step inside as the capture will; tell `found`, if given, what forbids it."""

    def capture(self, work: Callable[[], Any], blocks: int, seed: int) -> tuple[Any, Any]:
        """Capture `work` without running it; return (what has `replay()`, what `work` returned).

        Args:
            work: a whole step.
            blocks: checkpointed blocks in it.
            seed: of their random numbers.

        """

    def reset_after_failed_capture(self) -> None:
        """Make the device usable after a capture that broke off."""


class CapturedSteps(Steps):
    """Replays the step of a full batch; takes any other as it comes."""

    def __init__(
        self,
        function: StepFunction,
        optimizer: Optimizer,
        recovery: Recovery,
        batch_size: int,
        machinery: Machinery,
        *,
        scaler: object = None,
        processes: int = 1,
        compiled: bool = False,
        on_capture: Callable[[bool], None] = lambda captured: None,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__(self._run)
        self.function, self.recovery = function, recovery
        self._optimizer = optimizer
        self._batch_size = batch_size
        self._machinery = machinery
        self._scaler, self._processes, self._compiled = scaler, processes, compiled
        self._on_capture, self._say = on_capture, say
        self._given_up = False
        self._done = self._blocks = 0
        self._techniques: Techniques | None = None
        self._graph: Any = None
        recovery.give_way = self._give_way

    @property
    def captured(self) -> bool:
        """Whether a step is captured now."""
        return self._graph is not None

    def _run(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Replay a step, capture it if it is time to, or execute it eagerly."""
        if self._given_up or len(samples) != self._batch_size:
            return self.function(samples)
        if self._techniques != self.recovery.techniques:
            self._begin()
            if self._given_up:
                return self.function(samples)
        if self._done < WARM_STEPS:
            return self._warm(samples)
        if self._graph is None and not self._capture(samples):
            return self.function(samples)
        self._samples.copy_(cast(ResidentSamples, samples))
        for rate, group in zip(self._rates, self._groups(), strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        loss, weight = self._outputs
        return loss, weight

    def replays(self, samples: Samples) -> bool:
        """Tell whether the captured step will be replayed on these samples."""
        full = len(samples) == self._batch_size
        return full and self.captured and self._techniques == self.recovery.techniques

    def forget(self) -> None:
        """Give up the captured step; one is captured anew after as many steps as at first."""
        self._techniques = None
        self._drop()

    def _begin(self) -> None:
        """Start over with the techniques in force, unless they cannot be captured."""
        self._drop()
        self._techniques, self._done = self.recovery.techniques, 0
        reason = why_not_captured(
            self._optimizer, self._techniques, self._scaler, self._processes, self._compiled
        )
        if reason is not None:
            self._stay_eager(reason)

    def _warm(self, samples: Samples) -> tuple[Tensor, Tensor]:
        found: list[str] | None = [] if self._done == WARM_STEPS - 1 else None
        counter = BlockCounter()

        def work() -> tuple[Tensor, Tensor]:
            counter.blocks = 0
            with block_randomness(counter), self._machinery.warming(found):
                return self.function(samples)

        result = work()
        self._done += 1
        self._blocks = counter.blocks
        if found:
            self._stay_eager(found[0])
        return result

    def _capture(self, samples: Samples) -> bool:
        """Capture a step; tell whether there is one now."""
        state = RandomState(self.recovery.device)
        self._samples = cast(ResidentSamples, samples).clone()
        self._rates = [
            torch.full((), float(group["lr"]), device=self.recovery.device)
            for group in self._groups()
        ]
        seed = (torch.initial_seed() * 1_000_003 + self.recovery.position[0]) % 2**63
        capture = partial(
            self._machinery.capture, partial(self.function, self._samples), self._blocks, seed
        )
        reason = None
        with self._rates_on_device():
            try:
                captured = self.recovery.capture(
                    capture, self._machinery.reset_after_failed_capture
                )
            except UserError:
                raise  # it could not be mended, so that nothing would work from here on
            except Exception as error:
                if shortage(error) is not None:
                    raise
                reason = first_line(_first_cause(error))
        if reason is None and captured is not None:
            self._graph, self._outputs = captured
            self._on_capture(True)
            return True
        # Outside the handler, whose traceback holds what the capture had made.
        self._optimizer.zero_grad()
        if reason is not None:
            self._machinery.reset_after_failed_capture()
        self._stay_eager(f"the capture failed ({reason})" if reason else NO_ROOM)
        state.restore()
        release(self.recovery.device)
        return False

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Let the optimizer read its rates from tensors, for whose values replays will ask."""
        before = [{"lr": g["lr"], "capturable": g.get("capturable")} for g in self._groups()]
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, old in zip(self._groups(), before, strict=True):
                group.update({name: value for name, value in old.items() if name in group})

    def _groups(self) -> list[dict[str, Any]]:
        return bare_optimizer(self._optimizer).param_groups

    def _give_way(self) -> bool:
        """Give the captured step's memory back for good; tell whether there was one."""
        if self._graph is None:
            return False
        self._given_up = True
        self._drop()
        return True

    def _drop(self) -> None:
        if self._graph is None:
            return
        if self.recovery.device.type == "cuda":
            torch.cuda.synchronize(self.recovery.device)  # a replay may be under way
        self._graph = self._outputs = None
        self._on_capture(False)
        release(self.recovery.device)

    def _stay_eager(self, reason: str) -> None:
        self._given_up = True
        self._say(f"steps are not captured as a CUDA graph: {reason}")


def _first_cause(error: BaseException) -> BaseException:
    """Return what broke the capture off; that it cannot be ended is only said after that."""
    while error.__context__ is not None:
        error = error.__context__
    return error
