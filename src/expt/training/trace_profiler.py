"""`debug=profile`: a few training steps under torch's profiler, and whose memory was what.

The training loop tells the profiler which phase of a step it is in, and what it is given; here that
and torch's own events become files (`expt.training.profile_files`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter

from expt.config.schema import Compile
from expt.errors import first_line
from expt.memory.measuring.timeline import NOTE, PHASE, Note, places, read_timeline
from expt.memory.techniques.optimizer_in_backward import stepping
from expt.memory.techniques.wrapping import bare_optimizer
from expt.training.profiler import NOWHERE, StepProfiler, Watched
from expt.units import counted

log = logging.getLogger(__name__)

WAIT_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 3


@dataclass
class TraceProfiler(StepProfiler):
    """Profiles three steps, after three that are not typical.

    `files` are ``profile.json`` (open it in Perfetto or chrome://tracing), ``profile.txt``, and
    those of memory; see `expt.training.profile_files`.
    """

    run_dir: Path
    predicted_bytes: int | None = None
    """The peak that was predicted, to compare with."""
    say: Callable[[str], None] = lambda line: print(line, flush=True)
    files: Sequence[Path] = ()
    _taken: int = field(default=0, init=False)
    _notes: list[Note] = field(default_factory=list, init=False)
    _written: bool = field(default=False, init=False)
    _held_bytes: int = field(default=0, init=False)
    _hooks: list[Any] = field(default_factory=list, init=False)

    def compile(self, how: Compile, device: torch.device) -> Compile:
        """Have no step captured: a replay shows neither operators nor allocations."""
        if device.type != "cuda" or how is Compile.off:
            return how
        if how is not Compile.auto:
            self.say(
                f"trainer.compile={how.value}: a captured step shows neither operators nor "
                "allocations, so steps are eager while trainer.profile=true"
            )
        return Compile.off

    def begin(self, watched: Watched) -> None:
        """Start torch's profiler, which waits for its steps."""
        from torch import profiler

        from expt.memory.measuring.allocator_history import history_of

        self._watched = watched
        self._history = history_of(watched.device)
        self._profiler = profiler.profile(
            schedule=profiler.schedule(
                wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1
            ),
            on_trace_ready=self._write,
            profile_memory=True,
            record_shapes=True,
        )
        self._profiler.start()

    @property
    def _recording(self) -> bool:
        from torch.profiler import ProfilerAction

        now = self._profiler.current_action
        return now in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)

    def take_in(self, tensors: Sequence[Tensor]) -> None:
        """Note everything that is known to be there."""
        if not self._recording:
            return
        watched = self._watched
        if not self._notes:
            self._held_bytes = watched.meter.held_bytes()
        weights = [*watched.model.parameters(), *watched.model.buffers(), *watched.averages()]
        known = {
            "parameters": weights,
            "gradients": _gradients(watched.model.parameters()),
            "optimizer_state": list(_tensors(_inner(watched.optimizer).state)),
            "inputs": [*watched.resident(), *tensors],
        }
        self._note(known, whole=True)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name a range of the trace."""
        return self._range(name) if self._recording else NOWHERE

    def step(self) -> None:
        """Advance the profiler's schedule."""
        self._taken += 1
        was_recording = self._recording
        self._profiler.step()
        if self._recording and not was_recording:
            self._history.start()
            inner = _inner(self._watched.optimizer)
            self._hooks = [
                inner.register_step_pre_hook(self._before_step),
                inner.register_step_post_hook(self._after_step),
            ]

    def stop(self) -> None:
        """Close the profiler; of a run that is too short, write what there is, or say so."""
        self._profiler.stop()
        if not self._written:
            first, last = WAIT_STEPS + WARMUP_STEPS + 1, WAIT_STEPS + WARMUP_STEPS + ACTIVE_STEPS
            self.say(
                f"trainer.profile=true profiles steps {first} to {last}, and training ended after "
                f"{counted(self._taken, 'step')}: nothing was profiled; let it take {last} at least"
            )

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(PHASE + name):
            yield
        if name == "backward":
            self._note({"gradients": _gradients(self._watched.model.parameters())})

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Note the gradients at hand: one at a time, where weights are stepped in backward."""
        self._note({"gradients": _gradients(_weights(optimizer))})

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        state = [
            optimizer.state[weight] for weight in _weights(optimizer) if weight in optimizer.state
        ]
        self._note({"optimizer_state": list(_tensors(state))})

    def _note(self, known: Mapping[str, Iterable[Tensor]], whole: bool = False) -> None:
        if not self._recording:
            return
        kind = self._watched.device.type
        with torch.profiler.record_function(NOTE):
            found = {category: places(tensors, kind) for category, tensors in known.items()}
        self._notes.append(Note(found, whole))

    def _write(self, finished: Any) -> None:
        """Write the files; called by torch's profiler once its steps are done, or training is."""
        for hook in self._hooks:
            hook.remove()
        try:
            self._write_files(finished)
        except Exception as error:  # a full disk, say: the training is worth more than its profile
            log.warning("the profile was not written", exc_info=True)
            self.say(f"the profile was not written: {first_line(error)}")
        self._written, self._notes = bool(self._notes), []

    def _write_files(self, finished: Any) -> None:
        from expt.training.profile_files import write_profile

        watched = self._watched
        timeline = None
        if watched.device.type in ("cpu", "cuda") and self._notes:
            roots = finished.profiler.kineto_results.experimental_event_tree()
            timeline = read_timeline(roots, self._notes, watched.device, self._held_bytes)
        measured = watched.meter.peak_allocated_bytes()
        self.files = [
            *write_profile(
                finished, timeline, self.run_dir, measured, self.predicted_bytes, self.say
            ),
            *self._history.write(self.run_dir / "memory_snapshot.pickle"),
        ]


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer whose `step` changes weights."""
    return stepping(bare_optimizer(optimizer))


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _gradients(weights: Iterable[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def _tensors(tree: Any) -> Iterator[Tensor]:
    for value in tree.values() if isinstance(tree, Mapping) else tree:
        yield from (part for part in tree_iter(value) if isinstance(part, Tensor))
