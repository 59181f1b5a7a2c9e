"""What is recorded of a run, here and in the tracker, however it ends."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expt import __version__
from expt.config.schema import AUTO, COMMAND_NODES
from expt.config.settings import RunContext, Settings
from expt.errors import StorageError
from expt.files import write_json
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.planning.predict import Plan
from expt.memory.recovery.event import OomEvent
from expt.memory.watching.history import READINGS_NAME
from expt.memory.watching.manager import MemoryManager
from expt.result import CONFIG_NAME, PLAN_NAME, RunResult
from expt.tracking.metric_tags import tags_of_metrics
from expt.tracking.tracker import OncePerStep, Tracker
from expt.training import checkpoint
from expt.training.trainer import Trainer
from expt.units import with_gib
from expt.uri import shown_lines

HISTORY_NAME = "history.json"
EVENTS_NAME = "oom_events.json"

SIGNATURE_NAME = "signature.json"
"""The model's inputs and output, as MLflow describes them; beside the weights in its artifacts."""
WARM_UP_STEPS = 200
"""Fewer steps than these are no sign of a leak: libraries and caches are still filling."""


@dataclass
class Recorder:
    """Keeps ``result.json`` and the tracker in step; `result` grows while the run does."""

    run_dir: Path
    tracker: Tracker
    result: RunResult
    on_oom: Callable[[Mapping[str, Any]], None] = field(default=lambda event: None, init=False)
    """Told of every time that memory ran out."""
    started: bool = field(default=False, init=False)
    once: OncePerStep = field(init=False)
    """The tracker for what is recorded in the order of steps."""
    _waiting: list[OomEvent] = field(default_factory=list, init=False)
    _planned: Plan | None = field(default=None, init=False)
    _epochs: int = field(default=0, init=False)  # that training has begun

    def __post_init__(self) -> None:
        self.once = OncePerStep(self.tracker)

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the run in the tracker; a second call does nothing."""
        if not self.started:
            self.started = True
            result = self.result
            preset = {"preset": str(result.preset), "device": str(result.device)}
            preset |= {"monitor": result.monitor, **tags_of_metrics(result.metrics_meta)}
            origin = {"run_dir": str(self.run_dir), **_versions()}
            self.tracker.start(name, parameters, {**preset, **origin, **tags})
            self._tell()

    def progress(self, trainer: Trainer) -> None:
        """Take over how far training came, and the history's file."""
        result, progress = self.result, trainer.progress
        result.epochs, result.steps = progress.epoch, progress.step
        result.seconds = progress.seconds
        if progress.history:
            result.metrics[f"val/{trainer.monitor.name}"] = progress.best
        result.skipped_samples = len(trainer.batches.skipped)
        if self._planned is not None and self._planned.stages:
            from expt.run.stages import compared

            result.stages = compared(self._planned, progress.history)
        self._epochs = progress.epoch + (progress.step_in_epoch > 0)
        self.memory(trainer.meter)
        write_json(self.run_dir / HISTORY_NAME, progress.history)

    def memory(self, meter: MemoryMeter) -> None:
        """Take over the peaks measured so far."""
        self.result.memory |= {
            "peak_allocated_bytes": meter.peak_allocated_bytes(),
            "peak_reserved_bytes": meter.peak_reserved_bytes(),
            "meter": meter.name,
        }
        predicted, peak = self._predicted(), meter.peak_allocated_bytes()
        # With other techniques than those planned for, the two are of different runs.
        if predicted and peak and not self.result.oom_events:
            self.result.memory["prediction_error"] = predicted / peak - 1

    def _predicted(self) -> int | None:
        """Return the predicted peak; of a run in stages, of those that it has come to."""
        predicted: int | None = self.result.memory["predicted_peak_bytes"]
        stages = self._planned.stages if self._planned is not None else ()
        begun = [one.peak_bytes for one in stages if one.first_epoch < self._epochs]
        return max(begun) if predicted and begun else predicted

    def of_ranks(self, peaks: Sequence[Mapping[str, int | None]]) -> None:
        """Take over the peaks of several processes that train together; the largest counts."""
        self.result.ranks = [{"rank": rank, **own} for rank, own in enumerate(peaks)]
        memory = self.result.memory
        for name in peaks[0]:
            memory[name] = max((own[name] or 0 for own in peaks), default=0) or None
        if memory["prediction_error"] is not None:
            memory["prediction_error"] = (self._predicted() or 0) / memory[
                "peak_allocated_bytes"
            ] - 1

    def plan(self, planned: Plan | None, budget_bytes: int | None) -> None:
        """Take over what was predicted, and the limit."""
        self.result.memory["budget_bytes"] = budget_bytes
        self._planned = planned
        if planned is not None and planned.interval_bytes[1] is not None:  # else a lower bound
            self.result.memory["predicted_peak_bytes"] = planned.peak_bytes

    def watched(self, manager: MemoryManager) -> None:
        """Take over the readings of the run's memory, and say what should be changed."""
        if not any(history.readings for history in manager.histories.values()):
            return
        verdict = manager.leak().verdict
        self.tracker.tags({"memory.verdict": verdict})
        manager.write_csv(self.run_dir / READINGS_NAME)
        self.tracker.artifact(self.run_dir / READINGS_NAME, "memory")
        if verdict != "steady" and self.result.steps >= WARM_UP_STEPS:
            for suggestion in manager.suggestions():
                print(f"memory: {suggestion}")

    def oom(self, event: OomEvent) -> None:
        """Take over one time that memory ran out; it is told once the run has begun."""
        self.result.oom_events.append(event.as_dict())
        self.on_oom(event.as_dict())
        self._waiting.append(event)
        if self.started:
            self._tell()

    def earlier_oom_events(self, restored: Sequence[Mapping[str, Any]]) -> None:
        """Put the events of the run's earlier part first, also those after its last checkpoint.

        Args:
            restored: those of the checkpoint, then those of this process.

        """
        try:
            stored = json.loads((self.run_dir / EVENTS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = []
        own = len(self.result.oom_events)
        earlier = max(stored, restored[: len(restored) - own], key=len)
        self.result.oom_events[:0] = earlier

    def _tell(self) -> None:
        for event in self._waiting:
            print(event.line(), flush=True)
            for path in event.evidence:
                self.tracker.artifact(Path(path), "memory")
        if self._waiting:
            count = len(self.result.oom_events)
            last = self._waiting[-1]
            self.tracker.metrics({"memory/oom_events": float(count)}, last.step)
            self.tracker.tags({"oom_events": str(count), "oom_rung": last.rung or "none"})
            write_json(self.run_dir / EVENTS_NAME, self.result.oom_events)
        self._waiting.clear()

    def artifacts(self, plots: Sequence[Path]) -> None:
        """Record the files of a run that came to an end."""
        for plot in plots:
            self.tracker.artifact(plot, "plots")
        best = self.run_dir / checkpoint.FOLDER / checkpoint.BEST
        if best.exists():
            self.tracker.artifact(best, checkpoint.FOLDER)
        for name in (CONFIG_NAME, HISTORY_NAME):
            if (self.run_dir / name).exists():
                self.tracker.artifact(self.run_dir / name)

    def close(self) -> None:
        """Write the result here and in the tracker, with the ids where they are known."""
        result, tracker = self.result, self.tracker
        # A validation is `best/val/…`, and recorded already.
        figures = {
            name: value
            for name, value in result.metrics.items()
            if value is not None and not name.startswith("val/")
        }
        figures |= {
            f"memory/{name}": float(value)
            for name, value in result.memory.items()
            if isinstance(value, int)
        }
        error = result.memory["prediction_error"]
        if error is not None:
            figures["memory/prediction_error"] = error
        new = self.once.changed(with_gib({**figures, "seconds": result.seconds}))
        if new:
            tracker.metrics(new, result.steps)
        tracker.tags({"status": result.status, "stop_reason": result.stop_reason})
        tracker.flush()
        result.tracking = {
            "uri": tracker.uri,
            "run_id": tracker.run_id,
            "parent_run_id": tracker.parent_run_id,
        }
        experiment = getattr(tracker, "experiment_id", None)
        if experiment is not None:
            result.tracking["experiment_id"] = experiment
        result.save(self.run_dir)
        if self._planned is not None:
            write_json(self.run_dir / PLAN_NAME, self._planned.as_dict())
            tracker.artifact(self.run_dir / PLAN_NAME)
        if result.oom_events:
            write_json(self.run_dir / EVENTS_NAME, result.oom_events)
            tracker.artifact(self.run_dir / EVENTS_NAME)
        tracker.artifact(self.run_dir / "result.json")
        tracker.finish(result.outcome.columns.tracker_status)

    def close_after(self, error: BaseException) -> None:
        """Record a run that an error ended; the error is the one to report, whatever fails here."""
        self.result.status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        self.result.stop_reason = f"{type(error).__name__}: {error}"[:500]
        with contextlib.suppress(StorageError):
            self.close()


def device_name(device: torch.device) -> str:
    """Return a device for a reader: ``cuda (NVIDIA H200)``, ``cpu (x86_64)``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    """Return the versions that ran, and the state of the current folder's repository, if any."""
    versions = {"expt.version": __version__, "torch.version": str(torch.__version__)}
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        versions["mlflow.source.git.commit"] = commit
        changed = (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines()
        versions["git.dirty"] = f"{len(changed)} changed files" if changed else "no"
    return versions


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def description(settings: Settings, context: RunContext, model: str) -> dict[str, str]:
    """Return tags: the command line, and which model is trained on what."""
    lines = shown_lines(context.launch.get("overrides", ()))
    command = shlex.join(["python", "-m", "expt", *lines])
    arguments = settings.arguments["data"]
    source = str(arguments.get("path") or arguments["_target_"])
    name = Path(source).stem if arguments.get("path") else source.rpartition(".")[2]
    return {
        "command": command,
        "mlflow.note.content": f"{model} on {name}\n\n    {command}",
        "data.name": name,
        "data.source": source,
    }


def parameters(resolved: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the settings that a run is compared by: not where it is recorded, or read from.

    Nor those of other commands, or nodes in which there is nothing.
    """
    found = {
        str(key): value
        for key, value in resolved.items()
        if key not in COMMAND_NODES | {"tracking"} and not (key == "callbacks" and not value)
    }
    found["memory"] = {k: v for k, v in found["memory"].items() if k != "plan_file"}
    if found.get("data", {}).get("batch_size") != AUTO:
        found.pop("fit", None)
    if found.get("search"):
        found["search"] = {k: v for k, v in found["search"].items() if k != "storage"}
    return found
