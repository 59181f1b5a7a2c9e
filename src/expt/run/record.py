"""What is recorded of a run, here and in the tracker, however it ends."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expt import __version__
from expt.errors import StorageError
from expt.files import write_json
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.planning.predict import Plan
from expt.memory.recovery.event import OomEvent
from expt.memory.watching.manager import MemoryManager
from expt.result import PLAN_NAME, RunResult
from expt.tracking.tracker import Tracker
from expt.training import checkpoint
from expt.training.trainer import Trainer

CONFIG_NAME, HISTORY_NAME = "config.yaml", "history.json"
EVENTS_NAME = "oom_events.json"
READINGS_NAME = "memory.csv"


WARM_UP_STEPS = 200
"""Fewer steps than these are no sign of a leak: libraries and caches are still filling."""


@dataclass
class Recorder:
    """Keeps ``result.json`` and the tracker in step; `result` grows while the run does."""

    run_dir: Path
    tracker: Tracker
    result: RunResult
    started: bool = field(default=False, init=False)
    _waiting: list[OomEvent] = field(default_factory=list, init=False)
    _planned: Plan | None = field(default=None, init=False)

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the run in the tracker; a second call does nothing."""
        if not self.started:
            self.started = True
            result = self.result
            preset = {"preset": str(result.preset), "device": str(result.device)}
            preset |= {"monitor": result.monitor, "metrics": json.dumps(result.metrics_meta)}
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
        self.memory(trainer.meter)
        write_json(self.run_dir / HISTORY_NAME, progress.history)

    def memory(self, meter: MemoryMeter) -> None:
        """Take over the peaks measured so far."""
        self.result.memory |= {
            "peak_allocated_bytes": meter.peak_allocated_bytes(),
            "peak_reserved_bytes": meter.peak_reserved_bytes(),
            "meter": meter.name,
        }
        predicted, peak = self.result.memory["predicted_peak_bytes"], meter.peak_allocated_bytes()
        # With other techniques than those planned for, the two are of different runs.
        if predicted and peak and not self.result.oom_events:
            self.result.memory["prediction_error"] = predicted / peak - 1

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
        figures = {name: value for name, value in result.metrics.items() if value is not None}
        figures |= {
            f"memory/{name}": float(value)
            for name, value in result.memory.items()
            if isinstance(value, int)
        }
        error = result.memory["prediction_error"]
        if error is not None:
            figures["memory/prediction_error"] = error
        tracker.metrics({**figures, "seconds": result.seconds}, result.steps)
        tracker.tags({"status": result.status, "stop_reason": result.stop_reason})
        tracker.flush()
        result.tracking = {
            "uri": tracker.uri,
            "run_id": tracker.run_id,
            "parent_run_id": tracker.parent_run_id,
        }
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
    """Return the versions that ran, and the commit of the current folder's repository, if any."""
    versions = {"expt.version": __version__, "torch.version": str(torch.__version__)}
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return versions
    if found.returncode == 0:
        versions["mlflow.source.git.commit"] = found.stdout.strip()
    return versions
