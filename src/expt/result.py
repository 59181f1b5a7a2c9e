"""`RunResult`: a run as data, the content of ``result.json``; `Outcome`: how it ended, in a word.

Whoever looks at finished runs (searches, expansions, reports) needs nothing but these files: the
metrics describe themselves in ``metrics_meta``, so that no job's code is imported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from expt.files import write_json
from expt.job import Metric

FILE_NAME = "result.json"
LAUNCH_NAME = "launch.json"
STARTED = "started_seconds"
PLAN_NAME = "plan.json"
CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
"""A folder in a run's directory, of `expt.training.checkpoint`."""
Status = Literal["completed", "failed", "stopped"]
TrackerStatus = Literal["FINISHED", "FAILED", "KILLED"]
TrialState = Literal["COMPLETE", "PRUNED", "FAIL"]
MEMORY_ERRORS = (
    "out_of_memory", "OutOfMemoryError", "MemoryError", "RecoveryError", "BrokenStepError",
)  # fmt: skip
"""How a `stop_reason` begins when memory was what was missing."""


@dataclass(frozen=True)
class Columns:
    """What follows from an outcome.

    Args:
        trial_state: what Optuna is told. Samplers ignore FAIL, so what is to be learned from
            (it needs too much memory) is PRUNED.
        tracker_status: of the run in MLflow.
        exit_code: of a process that ends so; a signal's own code wins.
        counts: whether it is one of `search.n_trials` even if it was never started.
        retry: whether it may end otherwise the next time.
        over: whether it needed more memory than it was given, or would have.

    """

    trial_state: TrialState
    tracker_status: TrackerStatus
    exit_code: int
    counts: bool = True
    retry: bool = False
    over: bool = False


class Outcome(Enum):
    """How a run or a trial ended: one vocabulary for runs, searches, expansions and reports."""

    completed = "completed"
    over_budget = "over_budget"  # trained to its end, above the budget
    out_of_memory = "out_of_memory"
    pruned = "pruned"
    predicted_over = "predicted_over"  # predicted above the budget, and therefore never started
    duplicate = "duplicate"  # of another trial, whose state it takes
    diverged = "diverged"  # a loss or a figure that is not finite
    failed = "failed"
    killed = "killed"
    timeout = "timeout"
    stopped = "stopped"
    refused = "refused"  # the settings contradict each other
    unfinished = "unfinished"  # it runs, or nothing is known of its end

    @property
    def columns(self) -> Columns:
        """What follows from it."""
        return OUTCOMES[self]

    @property
    def words(self) -> str:
        """Return the outcome for a reader."""
        return self.value.replace("_", " ")

    @property
    def trained(self) -> bool:
        """Whether it was trained to its end, so that it has a figure to be compared by."""
        return self.columns.trial_state == "COMPLETE"

    @classmethod
    def parse(cls, text: object) -> Outcome:
        """Return the outcome of a stored word, also of one that earlier versions used."""
        try:
            return cls(EARLIER_WORDS.get(str(text), str(text)))
        except ValueError:
            return cls.unfinished


OUTCOMES = {
    Outcome.completed: Columns("COMPLETE", "FINISHED", 0),
    Outcome.over_budget: Columns("COMPLETE", "FINISHED", 0, over=True),
    Outcome.out_of_memory: Columns("PRUNED", "FAILED", 1, over=True),
    Outcome.pruned: Columns("PRUNED", "KILLED", 1),
    Outcome.predicted_over: Columns("PRUNED", "KILLED", 2, counts=False, over=True),
    Outcome.duplicate: Columns("PRUNED", "KILLED", 0, counts=False),
    Outcome.diverged: Columns("FAIL", "FAILED", 1),
    Outcome.failed: Columns("FAIL", "FAILED", 1, retry=True),
    Outcome.killed: Columns("FAIL", "FAILED", 1, retry=True),
    Outcome.timeout: Columns("FAIL", "FAILED", 1, retry=True),
    Outcome.stopped: Columns("FAIL", "KILLED", 130, retry=True),
    Outcome.refused: Columns("FAIL", "FAILED", 2, counts=False),
    Outcome.unfinished: Columns("FAIL", "FAILED", 1, retry=True),
}
EARLIER_WORDS = {
    "complete": "completed",
    "infeasible_measured": "over_budget",
    "oom": "out_of_memory",
    "infeasible_predicted": "predicted_over",
    "crashed": "failed",
    "nan": "diverged",
}
"""What studies and records of earlier versions call an outcome."""


@dataclass
class RunResult:
    """One run, whichever way it ended.

    `weights_sha256` is over the weights after the last step; the test figures are those of the
    best weights by validation. `metrics` has ``val/NAME`` of the metric that was monitored and
    ``test/NAME`` of all that `metrics_meta` describes, null where they were not reached; `seconds`
    cover all parts of a resumed run. `oom_events` are `expt.memory.recovery.event.OomEvent`;
    `fallback_run` is the directory of the smaller run that took over. `skipped_samples` counts
    the samples that could not be read; `loader` is what `expt.training.loading` saw of reading
    them, and `tuned` the changes made while training went on; `feature_cache` is how features were
    kept (mode, rows, bytes, seconds, reused, live: why not, staleness). `partial` says of which
    splits only a part was evaluated, like ``{"test": "8 of 6850 samples"}``. `ranks` has the peaks
    of each process where several train together; `memory` has the largest. `stages` has the epochs
    (from 0) of each stage of a run in stages, with its predicted and its measured peak.
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
    monitor: str = "mae"  # as all records before there was a choice
    metrics: dict[str, float | None] = field(default_factory=dict)
    metrics_meta: list[dict[str, Any]] = field(default_factory=list)
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
    skipped_samples: int = 0
    partial: dict[str, str] = field(default_factory=dict)
    loader: dict[str, Any] | None = None
    tuned: list[dict[str, Any]] = field(default_factory=list)
    feature_cache: dict[str, Any] | None = None
    data_fingerprint: str | None = None
    fallback_run: str | None = None
    ranks: list[dict[str, Any]] | None = None
    stages: list[dict[str, Any]] | None = None
    tracking: dict[str, str | None] = field(
        default_factory=lambda: {"uri": None, "run_id": None, "parent_run_id": None}
    )

    @property
    def run_dir(self) -> Path | None:
        """Where it was read or written; not in the file, so that a folder can be moved."""
        return vars(self).get("_run_dir")

    @run_dir.setter
    def run_dir(self, folder: Path) -> None:
        vars(self)["_run_dir"] = folder

    @property
    def outcome(self) -> Outcome:
        """How it ended; whether it was over a budget is the search's to say."""
        if self.status == "completed":
            return Outcome.completed
        if self.stop_reason.startswith(MEMORY_ERRORS):
            return Outcome.out_of_memory
        if self.stop_reason == "non_finite_loss":
            return Outcome.diverged
        return Outcome.stopped if self.status == "stopped" else Outcome.failed

    @property
    def exit_code(self) -> int:
        """0 for a completed run, else 1; a signal's code is decided where it was caught."""
        return 0 if self.status == "completed" else 1

    def describe(self, metrics: Sequence[Metric], monitor: str) -> None:
        """Take over what the data set measures; every figure is there from then on, as null."""
        self.monitor = monitor
        self.metrics_meta = [metric.as_dict() for metric in metrics]
        self.unit = self.metric().unit or None
        names = [f"val/{monitor}", *(f"test/{metric.name}" for metric in metrics)]
        self.metrics = {**dict.fromkeys(names), **self.metrics}

    def metric(self, name: str | None = None) -> Metric:
        """Return the description of a metric, with or without ``val/``; the monitored by default.

        One that the record does not describe is an error figure in the record's unit, which is
        what all were before records described them.
        """
        bare = (name or self.monitor).rpartition("/")[2]
        for stored in self.metrics_meta:
            if stored.get("name") == bare:
                return Metric.from_dict(stored)
        if bare == "mape":
            return Metric(bare, percent=True, digits=4)
        return Metric(bare, unit=self.unit or "")

    def value(self) -> float | None:
        """Return the best validation figure of the metric that was monitored."""
        return self.metrics.get(f"val/{self.monitor}")

    def save(self, run_dir: Path) -> None:
        """Write ``result.json`` atomically."""
        self.run_dir = run_dir
        write_json(run_dir / FILE_NAME, asdict(self))


def save_launch(run_dir: Path, launch: Mapping[str, Any]) -> None:
    """Write how a run was started (`overrides`, `cwd`, `config_dir`), once, for resuming it.

    Hydra's own copy in ``.hydra/`` is overwritten by every later command in this directory, also
    by one that is refused. When the run was first started stays in the file, too.
    """
    started = started_seconds(run_dir) or time.time()
    write_json(run_dir / LAUNCH_NAME, {**launch, STARTED: started}, private=True)


def started_seconds(run_dir: Path) -> float:
    """Return when the run in this directory was first started, since the epoch; 0 if none was."""
    known = (load_launch(run_dir) or {}).get(STARTED)
    if isinstance(known, int | float):
        return float(known)
    try:  # of earlier versions
        return (run_dir / LAUNCH_NAME).stat().st_mtime
    except OSError:
        return 0.0


def load_launch(run_dir: Path) -> dict[str, Any] | None:
    """Return how the run in this directory was started, or None if none was."""
    try:
        stored = json.loads((run_dir / LAUNCH_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(stored, dict) and {"overrides", "cwd", "config_dir"} <= stored.keys()
    return stored if known else None


def known_fields(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass among stored values; a later version may have written more.

    Raises:
        TypeError: a field that is a mapping or a list is stored as something else.

    """
    found = {part.name: stored[part.name] for part in fields(kind) if part.name in stored}
    for part in fields(kind):
        made = None if part.default_factory is MISSING else part.default_factory()
        if made is not None and not isinstance(found.get(part.name, made), type(made)):
            raise TypeError(f"{part.name} is {found[part.name]!r}")
    return found


def load_result(run_dir: Path) -> RunResult | None:
    """Return the result stored in a run's directory, or None if there is none that can be read."""
    try:
        stored = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
        result = RunResult(**known_fields(RunResult, stored))
    except (OSError, ValueError, TypeError):
        return None
    result.run_dir = run_dir
    return result
