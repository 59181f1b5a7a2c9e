"""One configuration of an expansion: predicted, and if that fits, trained for a short while.

The training is a run like any other, in a process and a folder of its own, nested under the
expansion's run in the tracker. It may not recover from a lack of memory: that it does not fit is
the answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from expt.commands.expand.policy import Probe
from expt.config.command_nodes import ExpandConfig
from expt.config.compose import CONFIG_NAME, key, setting
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ExptError
from expt.job import Metric
from expt.memory.measuring.device_memory import planned_type
from expt.memory.planning.predict import Plan
from expt.result import Outcome, RunResult, TrackerStatus, load_launch, load_result
from expt.run.build import build
from expt.run.planner import plan_training
from expt.run.process import Ended, run_apart
from expt.tracking.tracker import close_left_open
from expt.units import format_bytes

log = logging.getLogger(__name__)

FORCED = (
    "task=train",
    "memory.on_overflow=train",
    "memory.recover=false",
    "memory.fallback=none",
    "trainer.progress=false",
    "trainer.test=false",  # steps are chosen by validation
)
OUTPUT_NAME = "output.log"


def forced(expansion: ExpandConfig) -> list[str]:
    """Return the settings that every probe is given, whatever its step changes."""
    lengths = {
        "trainer.epochs": expansion.probe_epochs,
        "trainer.steps_per_epoch": expansion.probe_steps,
    }
    return [*FORCED, *(f"{name}={value}" for name, value in lengths.items() if value is not None)]


@dataclass
class Prober:
    """Probes settings on top of a command line; called as `policy.expand` calls it.

    Args:
        base: the settings of the starting point.
        settings: the same, checked.
        context: of the expansion.
        expansion: how long a probe is.
        budget_bytes: what a predicted peak may take.
        metric: that probes are judged by.
        stopped: says whether the user asked to stop.

    """

    base: Sequence[str]
    settings: Settings
    context: RunContext
    expansion: ExpandConfig
    budget_bytes: int | None
    metric: Metric
    stopped: Callable[[], bool] = lambda: False

    def lines(self, changes: Sequence[str]) -> list[str]:
        """Return the command line of a probe, without where it is written."""
        return [*self.base, *changes, *forced(self.expansion)]

    def __call__(self, number: int, changes: tuple[str, ...]) -> Probe:
        """Predict, and run what is predicted to fit."""
        try:
            planned = self._plan(changes)
        except (ExptError, HydraException, OmegaConfBaseException) as error:
            return Probe(Outcome.refused, detail=" ".join(str(error).split()))
        peak = planned.peak_bytes if planned else None
        if planned and self.budget_bytes is not None and planned.demand_bytes > self.budget_bytes:
            return Probe(
                Outcome.predicted_over,
                predicted_peak_bytes=peak,
                detail=f"not run: predicted {format_bytes(planned.demand_bytes)}, the budget is "
                f"{format_bytes(self.budget_bytes)}",
            )
        folder, resuming = self._folder(number, changes)
        says = changes[-1] if number else "the starting point"
        print(f"step {number}: {says}", flush=True)
        try:
            ended = run_apart(
                [*self._arguments(changes, folder), *(["trainer.resume=true"] if resuming else [])],
                folder.with_name(f"{folder.name}.{OUTPUT_NAME}"),
                self.expansion.probe_time_limit_seconds,
                self.stopped,
            )
        except BaseException:  # a second Ctrl-C: the process was killed
            self._close_in_tracker(folder)
            raise
        if ended.exit_code < 0 or load_result(folder) is None:
            self._close_in_tracker(folder)
        return self._probe(folder, ended, peak)

    def _plan(self, changes: Sequence[str]) -> Plan | None:
        """Return what is predicted, None where that cannot be done."""
        lines = self.lines(changes)
        given = [key(line) for line in lines]
        settings = validated(compose(CONFIG_NAME, overrides=lines), given)
        if not settings.memory.plan:
            return None
        try:
            planned = plan_training(
                settings, build(settings, "data"), planned_type(settings.trainer.device.value)
            )
        except ExptError:
            raise
        except Exception as error:  # whatever a user's model does under fake tensors
            log.info("planning failed", exc_info=True)
            print(f"peak memory not predicted: {type(error).__name__}: {error}"[:200])
            return None
        return planned if planned.interval_bytes[1] is not None else None

    def _folder(self, number: int, changes: Sequence[str]) -> tuple[Path, bool]:
        """Return where to run, and whether an earlier part of the same run is there."""
        wanted = set(self.lines(changes))
        attempt = 1
        while True:
            name = f"step_{number:02d}" + (f"_{attempt}" if attempt > 1 else "")
            folder = self.context.run_dir / name
            launch = load_launch(folder)
            if launch is None:
                return folder, False
            if {line for line in launch["overrides"] if "tracking.parent=" not in line} == wanted:
                return folder, True
            attempt += 1

    def _arguments(self, changes: Sequence[str], folder: Path) -> list[str]:
        own = self.context.launch.get("config_dir")
        return [
            *([f"--config-dir={own}"] if own else []),
            *self.lines(changes),
            setting("tracking.parent", self.context.run_dir.absolute()),
            setting("hydra.run.dir", folder.absolute()),
        ]

    def _close_in_tracker(self, folder: Path) -> None:
        status: TrackerStatus = "KILLED" if self.stopped() else "FAILED"
        close_left_open(self.settings.tracking, folder, self.context.run_dir, status)

    def _probe(self, folder: Path, ended: Ended, predicted: int | None) -> Probe:
        result = load_result(folder)
        outcome, detail = self._outcome(result, ended, folder)
        if result is None:
            return Probe(outcome, predicted_peak_bytes=predicted, detail=detail)
        return Probe(
            outcome,
            self._value(result) if outcome is Outcome.completed else None,
            predicted_peak_bytes=predicted,
            peak_allocated_bytes=result.memory["peak_allocated_bytes"],
            peak_reserved_bytes=result.memory["peak_reserved_bytes"],
            parameters=result.parameters,
            seconds=result.seconds,
            run_dir=str(folder),
            run_id=result.tracking["run_id"],
            detail=detail,
        )

    def _outcome(self, result: RunResult | None, ended: Ended, folder: Path) -> tuple[Outcome, str]:
        if ended.timed_out:
            return Outcome.timeout, ended.because()
        if self.stopped() and (result is None or result.status != "completed"):
            return Outcome.stopped, "stopped before it was finished"
        if result is None or (result.status == "stopped" and ended.exit_code < 0):
            said = _last_line(folder.with_name(f"{folder.name}.{OUTPUT_NAME}"))
            if ended.exit_code == 2:
                return Outcome.refused, said
            return Outcome.failed, f"{ended.because()}: {said}" if said else ended.because()
        if result.outcome is Outcome.completed:
            value = self._value(result)
            if value is None or not math.isfinite(value):
                return (
                    Outcome.diverged, f"the validation {self.metric.label} is not a finite number",
                )  # fmt: skip
            return Outcome.completed, ""
        if result.outcome is Outcome.out_of_memory:
            return Outcome.out_of_memory, "ran out of memory"
        if result.outcome is Outcome.diverged:
            return Outcome.diverged, "the loss is not finite: the probe diverged"
        return Outcome.failed, result.stop_reason

    def _value(self, result: RunResult) -> float | None:
        return result.metrics.get(f"val/{self.metric.name}")


def _last_line(path: Path) -> str:
    """Return what a process said last, without the word error."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ").strip()[:300] if lines else ""
