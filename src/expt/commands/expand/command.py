"""`task=expand`: from a preset, one parameter at a time along `expand.steps` (guide A).

Every step is predicted, then trained for a short while on top of what was kept before; it is kept
if it fits `memory.budget` and does not hurt the monitored metric. ``expand.json``,
``expand.md`` and the figure are written after every step, so that an expansion that was stopped
or killed goes on with ``trainer.resume=RUN_DIR`` and runs no finished step again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from expt.commands.expand.figures import as_markdown, expansion_table, plot_expansion
from expt.commands.expand.policy import Probe, Step, expand, kept_changes, last_values, stored_probe
from expt.commands.expand.probe import Prober, forced
from expt.commands.expand.steps import among, step_problems, without_effect, without_settings
from expt.config.command_nodes import ExpandConfig
from expt.config.compose import key, typed
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.files import write_json, write_text
from expt.job import Metric, monitored
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import planned_type
from expt.result import Outcome, load_launch, save_launch
from expt.run.build import build_training_data
from expt.tables import print_table
from expt.tracking.tracker import Tracker, open_tracker
from expt.training.interruption import Interruption, Stopped
from expt.units import format_bytes
from expt.uri import shown_lines

FILE_NAME, TABLE_NAME = "expand.json", "expand.md"
OWN = ("task", "expand", "trainer.resume")
"""Keys of this command line that are not the starting point's."""


@dataclass(frozen=True)
class ExpandResult:
    """What was found, as it stands in ``expand.json``; exit code 1 if there is nothing to keep."""

    record: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 once the starting point was kept."""
        return 0 if self.record["command"] is not None else 1


def run(cfg: DictConfig, context: RunContext) -> ExpandResult:
    """Expand the configured model step by step.

    Raises:
        UserError: a problem in the configuration, the data or a step; nothing was started.
        Stopped: SIGINT or SIGTERM; what is finished is saved.

    """
    settings = validated(cfg, context.overridden)
    expansion = cast(ExpandConfig, OmegaConf.to_object(cfg.expand))
    base = [line for line in context.launch.get("overrides", ()) if not among(key(line), OWN)]
    if "expand.steps" not in context.overridden:  # a list for whichever model is configured
        for step, missing in without_settings(base, expansion.steps).items():
            expansion.steps.remove(step)
            print(f"skipped: {step}: {missing}")
        for step in without_effect(base, expansion.steps):
            expansion.steps.remove(step)
            print(f"skipped: {step}: the starting point has it already")
    problems = expansion.problems() or step_problems(base, expansion.steps, forced(expansion))
    if problems:
        raise ConfigError(problems)
    earlier = _earlier(context.run_dir, resuming=settings.trainer.resume is not False)
    budget = None
    if settings.memory.budget is not None:
        device = torch.device(planned_type(settings.trainer.device.value))
        budget = Budget.parse(settings.memory.budget, device).bytes
    data = build_training_data(settings)
    with Interruption() as interruption:
        metric = monitored(data.metrics, settings.trainer.monitor)
        prober = Prober(
            base, settings, context, expansion, budget, metric,
            stopped=lambda: interruption.received is not None,
        )  # fmt: skip
        record = Record(prober, expansion, context, settings)
        record.start()
        try:
            steps = expand(
                expansion.steps,
                prober,
                metric,
                expansion.tolerance,
                budget,
                record.known(earlier),
                record.write,
            )
        except BaseException as error:
            record.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        result = record.close(steps, interruption.received)
    if interruption.received is not None:
        raise Stopped(interruption.received)
    return result


class Record:
    """Keeps the expansion's files and its run in the tracker in step with what is known."""

    def __init__(
        self, prober: Prober, expansion: ExpandConfig, context: RunContext, settings: Settings
    ) -> None:
        self._prober, self._expansion, self._context = prober, expansion, context
        self.tracker: Tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
        self._told = 0

    def start(self) -> None:
        """Write how this was started, and open the run."""
        run_dir = self._context.run_dir
        if load_launch(run_dir) is None:
            save_launch(run_dir, self._context.launch)
        self.tracker.start(
            f"expand-{run_dir.name}",
            {
                "start": " ".join(shown_lines(self._prober.base)),
                "steps": " ".join(self._expansion.steps),
                "tolerance": self._expansion.tolerance,
                "budget_bytes": self._prober.budget_bytes,
            },
            {"kind": "expand", "run_dir": str(run_dir)},
        )

    def known(self, earlier: Mapping[str, Any]) -> dict[tuple[str, ...], Probe]:
        """Return the probes of an earlier part that were of the same starting point and length."""
        if shown_lines(earlier.get("probe", ())) != shown_lines(self._prober.lines([])):
            return {}
        found = {}
        for stored in earlier.get("steps", []):
            probe = stored_probe(stored)
            if probe.outcome is not Outcome.stopped:
                found[tuple(stored["changes"])] = probe
        return found

    def write(self, steps: Sequence[Step]) -> None:
        """Write the files, and tell the tracker of steps it does not know."""
        run_dir = self._context.run_dir
        write_json(run_dir / FILE_NAME, self.as_dict(steps, finished=False))
        write_text(run_dir / TABLE_NAME, as_markdown(steps, self._metric))
        for step in steps[self._told :]:
            figures = {
                f"expand/{self._metric.name}": step.probe.value,
                "expand/peak_bytes": step.probe.demand_bytes,
                "expand/predicted_peak_bytes": step.probe.predicted_peak_bytes,
                "expand/kept": float(step.kept),
            }
            known = {name: float(value) for name, value in figures.items() if value is not None}
            self.tracker.metrics(known, step.number)
            self.tracker.tags({f"step.{step.number}": f"{step.change or 'start'}: {step.reason}"})
            if step.change is not None:
                print(f"  {'kept' if step.kept else 'not kept'}: {step.reason}", flush=True)
        self._told = len(steps)

    def close(self, steps: Sequence[Step], signal: int | None) -> ExpandResult:
        """Print and record the end."""
        run_dir = self._context.run_dir
        record = self.as_dict(steps, finished=signal is None)
        write_json(run_dir / FILE_NAME, record)
        plots = plot_expansion(steps, self._metric, self._prober.budget_bytes, run_dir / "plots")
        print_table(expansion_table(steps, self._metric))
        self._say(steps, record, signal)
        for path in (run_dir / FILE_NAME, run_dir / TABLE_NAME):
            self.tracker.artifact(path)
        for path in plots:
            self.tracker.artifact(path, "plots")
        ending = "FINISHED" if record["command"] is not None else "FAILED"
        self.tracker.finish("KILLED" if signal is not None else cast(Any, ending))
        return ExpandResult(record)

    def as_dict(self, steps: Sequence[Step], finished: bool) -> dict[str, Any]:
        """Return the content of ``expand.json``."""
        kept = kept_changes(steps)
        command = None
        if any(step.kept for step in steps):
            own = self._context.launch.get("config_dir")
            folder = [f"--config-dir={own}"] if own else []
            lines = last_values([*self._prober.base, *kept])
            command = shlex.join(["python", "-m", "expt", *folder, *shown_lines(lines)])
        return {
            "finished": finished,
            "command": command,
            "kept": kept,
            "metric": self._metric.name,
            "tolerance": self._expansion.tolerance,
            "budget_bytes": self._prober.budget_bytes,
            "probe": shown_lines(self._prober.lines([])),
            "steps": [step.as_dict() for step in steps],
        }

    @property
    def _metric(self) -> Metric:
        metric = self._prober.metric
        return replace(metric, name=f"val/{metric.name}")

    def _say(self, steps: Sequence[Step], record: Mapping[str, Any], signal: int | None) -> None:
        if signal is not None:
            resume = typed("trainer.resume", self._context.run_dir)
            print(f"stopped; to go on: python -m expt {resume}")
        elif record["command"] is None:
            print(f"the starting point itself cannot be kept: {steps[0].reason}")
        else:
            budget = self._prober.budget_bytes
            inside = "" if budget is None else f" inside {format_bytes(budget)}"
            print(f"{len(record['kept'])} of {len(steps) - 1} steps kept{inside}; to train it:")
            print(f"  {record['command']}")
        print(f"files: {self._context.run_dir}")


def _earlier(run_dir: Path, resuming: bool) -> dict[str, Any]:
    """Return the record of an earlier part of this expansion, empty if there is none.

    Raises:
        ConfigError: there is one and it is not to go on, or is of another version.

    """
    try:
        stored = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not resuming:
        raise ConfigError(
            f"{run_dir} already holds an expansion; to go on with it, give "
            f"{typed('trainer.resume', run_dir)}, else another folder as hydra.run.dir"
        )
    try:
        for step in stored["steps"]:
            stored_probe(step), tuple(step["changes"])
        list(stored["probe"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{run_dir / FILE_NAME} is not of this version of expt, so that the expansion cannot "
            "go on; begin it again in another folder (hydra.run.dir)"
        ) from error
    return cast(dict[str, Any], stored)
