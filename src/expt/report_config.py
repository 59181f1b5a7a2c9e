"""Node `report`: which runs are looked at, by which metric, and what was claimed of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from expt.units import parse_bytes


@dataclass
class ClaimConfig:
    """What a source says of one preset, and the settings it says it of."""

    peak: str = MISSING  # as the source has it, like 30 GB
    error: str = MISSING  # the same, like < 3.5
    settings: dict[str, Any] = field(default_factory=dict)  # a run with others is not compared


@dataclass
class ReportConfig:
    """Node of the task `report`."""

    runs: Any = None  # folders or globs, or MLflow run ids; None: outputs
    experiment: str | None = None  # an MLflow experiment of tracking.uri, instead of folders
    filter: str | None = None  # which of an experiment's runs, in MLflow's words
    metric: str = "val/mae"  # the lower the better
    budget: Any = None  # to draw; None: the budget that all runs had
    title: str | None = None
    rows: int = 60  # of the table in the page; runs.csv holds all
    claims: dict[str, ClaimConfig] = field(default_factory=dict)  # by preset

    def problems(self) -> list[str]:
        """Return one message per value out of range, and per contradiction."""
        found = [f"report.rows must be at least 1, got {self.rows}"] if self.rows < 1 else []
        if self.filter is not None and self.experiment is None:
            found.append(
                f"report.filter={self.filter!r} chooses among the runs of an experiment; name it "
                "with report.experiment=NAME"
            )
        if self.experiment is not None and self.runs is not None:
            found.append(
                f"report.experiment={self.experiment} and report.runs={self.runs} are two sources; "
                "give one of them"
            )
        if self.budget is not None:
            try:
                parse_bytes(self.budget)
            except ValueError as error:
                found.append(f"report.budget={self.budget} {error}")
        return found
