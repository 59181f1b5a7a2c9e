"""``sweep.json``: what became of a study, rewritten after every trial.

    summary = SweepSummary.load(Path("outputs/sweeps/alternating"))
    summary.best["val/mae"], summary.finished, summary.infeasible_predicted

What is said of a single trial is in the Optuna study (`expt.sweep.trials` names its attributes)
and, under the same names, in the tags of its run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expt.files import write_json

FILE_NAME = "sweep.json"


@dataclass
class SweepSummary:
    """The state of a study.

    `finished` counts trained trials in any terminal state; of these are `failed`, `pruned` (by
    the pruner) and `infeasible_measured` (memory ran out, or more than the budget was measured).
    Beside them are those that were never trained: `infeasible_predicted`, `duplicates`,
    `refused`. `seconds` is the time spent in trained trials.

    `best` is None or {`trial`, `params`, ``val/mae``, `peak_allocated_bytes`, `run_id`}, and with
    them `run_dir`, `spread` (over `search.repeats`, else None) and ``test/...`` once tested.
    `pareto` is a list of the same, without a better one in both error and peak, by peak.
    """

    study: str
    n_trials: int
    finished: int = 0
    failed: int = 0
    pruned: int = 0
    infeasible_measured: int = 0
    infeasible_predicted: int = 0
    duplicates: int = 0
    refused: int = 0
    running: int = 0
    seconds: float = 0.0
    budget_bytes: int | None = None
    storage: str | None = None
    best: dict[str, Any] | None = None
    pareto: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write ``sweep.json`` atomically."""
        write_json(folder / FILE_NAME, asdict(self), durable=False)

    @classmethod
    def load(cls, folder: Path) -> SweepSummary | None:
        """Return the summary in a sweep's directory, None if there is none that can be read."""
        try:
            return cls(**json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
