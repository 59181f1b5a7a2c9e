"""`RunResult`: how a run ended, as data; the content of ``result.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from expt.files import write_json

FILE_NAME = "result.json"
LAUNCH_NAME = "launch.json"
PLAN_NAME = "plan.json"
Status = Literal["completed", "failed", "stopped"]

METRIC_NAMES = (
    "val/mae",
    "test/mae",
    "test/mae_15min",
    "test/mae_30min",
    "test/mae_60min",
    "test/rmse",
    "test/mape",
)
"""Always present in ``metrics``; null where they were not reached, or the series has no such step.

Then ``test/mae_{minutes}min`` of other steps may follow (`expt.jobs.traffic.metrics`).
"""


@dataclass
class RunResult:
    """One run, whichever way it ended.

    `weights_sha256` is over the weights after the last step; the test figures are those of the
    best weights by validation. `metrics` are in `unit` (null: the data set names none), `seconds`
    cover all parts of a resumed run.
    `oom_events` are `expt.memory.recovery.event.OomEvent`; `fallback_run` is the directory of
    the smaller run that took over.
    """

    status: Status
    stop_reason: str
    resumed_from_step: int = 0
    weights_sha256: str | None = None
    preset: str | None = None
    device: str | None = None
    precision: str | None = None
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    parameters: int | None = None
    unit: str | None = "mph"  # what a record without one was in
    metrics: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(METRIC_NAMES, None)
    )
    memory: dict[str, Any] = field(
        default_factory=lambda: {
            "peak_allocated_bytes": None,
            "peak_reserved_bytes": None,
            "predicted_peak_bytes": None,
            "budget_bytes": None,
            "prediction_error": None,
            "meter": None,
        }
    )
    oom_events: list[Mapping[str, Any]] = field(default_factory=list)
    fallback_run: str | None = None
    tracking: dict[str, str | None] = field(
        default_factory=lambda: {"uri": None, "run_id": None, "parent_run_id": None}
    )

    @property
    def exit_code(self) -> int:
        """0 for a completed run, else 1; a signal's code is decided where it was caught."""
        return 0 if self.status == "completed" else 1

    def save(self, run_dir: Path) -> None:
        """Write ``result.json`` atomically."""
        write_json(run_dir / FILE_NAME, asdict(self))


def save_launch(run_dir: Path, launch: Mapping[str, Any]) -> None:
    """Write how a run was started (`overrides`, `cwd`, `config_dir`), once, for resuming it.

    Hydra's own copy in ``.hydra/`` is overwritten by every later command in this directory, also
    by one that is refused.
    """
    write_json(run_dir / LAUNCH_NAME, dict(launch))


def load_launch(run_dir: Path) -> dict[str, Any] | None:
    """Return how the run in this directory was started, or None if none was."""
    try:
        stored = json.loads((run_dir / LAUNCH_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(stored, dict) and {"overrides", "cwd", "config_dir"} <= stored.keys()
    return stored if known else None


def load_result(run_dir: Path) -> RunResult | None:
    """Return the result stored in a run's directory, or None if there is none that can be read."""
    try:
        stored = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
        return RunResult(**stored)
    except (OSError, ValueError, TypeError):
        return None
