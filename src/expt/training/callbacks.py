"""Hooks by configuration: code of one's own at five moments of a run.

    # my_lab.py
    class Notify:
        def __init__(self, address: str) -> None: ...
        def run_end(self, result): ...

    python -m expt 'callbacks=[{_target_: my_lab.Notify, address: me}]'

A class needs any of the methods of `Callback` and no base. What it raises ends the run like a fault
in the model. A step that is redone for lack of memory is no moment of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from expt.job import Split
from expt.result import RunResult

Trainer = Any
"""The run's `expt.training.trainer.Trainer`: its model, data, settings, progress and run_dir."""
log = logging.getLogger(__name__)


class Callback:
    """The five moments; each method does nothing until it is overridden."""

    def run_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first after a resume: `trainer.progress.step`."""

    def evaluation_end(self, trainer: Trainer, split: Split, figures: Mapping[str, float]) -> None:
        """After a validation (``val``, the weights of now) and the test (``test``, the best)."""

    def epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """After an epoch is validated and saved; `row` is its row of ``history.json``."""

    def out_of_memory(self, event: Mapping[str, Any]) -> None:
        """After memory ran out, with what is done about it: a row of ``oom_events.json``."""

    def run_end(self, result: RunResult) -> None:
        """After the run is recorded, however it ended; `result.run_dir` has its files."""


class Callbacks:
    """Those of a run, in the order that they were given."""

    def __init__(self, hooks: Sequence[Any] = ()) -> None:
        self._hooks = tuple(hooks)

    def run_start(self, trainer: Trainer) -> None:
        """Tell that training begins."""
        self._tell("run_start", trainer)

    def evaluation_end(self, trainer: Trainer, split: Split, figures: Mapping[str, float]) -> None:
        """Tell what an evaluation found."""
        self._tell("evaluation_end", trainer, split, dict(figures))

    def epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Tell that an epoch is done."""
        self._tell("epoch_end", trainer, dict(row))

    def out_of_memory(self, event: Mapping[str, Any]) -> None:
        """Tell that memory ran out."""
        self._tell("out_of_memory", event)

    def run_end(self, result: RunResult, after_error: bool = False) -> None:
        """Tell how the run ended; after an error, which is the one to report, nothing is raised."""
        try:
            self._tell("run_end", result)
        except Exception:
            if not after_error:
                raise
            log.exception("a callback failed after the run had")

    def _tell(self, moment: str, *arguments: Any) -> None:
        for hook in self._hooks:
            method = getattr(hook, moment, None)
            if method is not None:
                method(*arguments)
