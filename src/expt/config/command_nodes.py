"""The configuration nodes of single commands, like `diagnose`, `expand` and `report`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from expt.units import parse_bytes


@dataclass
class ReplayConfig:
    """Node of the task `replay`."""

    root: str = "outputs"


@dataclass
class DiagnoseConfig:
    """Node of the task `diagnose`."""

    log: str | None = None  # an error message, a log, a CSV of readings, or a history.json


@dataclass
class FitConfig:
    """Node of the task `fit_batch` and of ``data.batch_size=auto``."""

    margin: float = 0.9  # of the budget: what the predicted peak may take
    confirm: bool = True  # two real steps with what was found, where the device is here
    max_batch: int = 1024  # the largest batch to look for

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = at_least("fit", self, max_batch=1)
        if not 0 < self.margin <= 1:
            found.append(
                f"fit.margin must be above 0 and at most 1, got {self.margin}; try fit.margin=0.9"
            )
        return found


@dataclass
class CardsConfig:
    """Node of the task `cards`."""

    sizes_gib: list[float] = field(
        default_factory=lambda: [8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 40.0, 80.0, 141.0]
    )
    context_gib: float = 0.6  # of a card: what the CUDA context and libraries take

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        if not (math.isfinite(self.context_gib) and self.context_gib >= 0):
            return [f"cards.context_gib must not be negative, got {self.context_gib}"]
        sizes = [f"{size:g}" for size in self.sizes_gib if not self.context_gib < size < math.inf]
        if sizes or not self.sizes_gib:
            return [
                "cards.sizes_gib must be GiB of memory, each above "
                f"cards.context_gib={self.context_gib:g}, like [8,12,24]; "
                f"got {', '.join(sizes) or 'none'}"
            ]
        return []


@dataclass
class ExpandConfig:
    """Node of the task `expand`."""

    steps: list[str] = field(default_factory=list)  # one setting each, tried in this order
    probe_epochs: int | None = 2  # of each probe; None: trainer.epochs
    probe_steps: int | None = 300  # optimizer steps in an epoch; None: trainer.steps_per_epoch
    tolerance: float = 0.01  # by what part of the best validation a step may be worse
    probe_time_limit_seconds: float | None = None  # after which a probe is ended, and not kept

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = [
            f"expand.{name} must be at least 1, got {value}"
            for name in ("probe_epochs", "probe_steps")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            found.append(
                f"expand.tolerance must not be negative, got {self.tolerance}; 0.01 keeps a step "
                "whose validation is at most 1 % worse than the best"
            )
        limit = self.probe_time_limit_seconds
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            found.append(
                f"expand.probe_time_limit_seconds must be a positive number or null, got {limit}"
            )
        return found


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
    metric: str | None = None  # like val/mae; None: the one that the runs monitored
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


def at_least(group: str, config: object, **limits: int) -> list[str]:
    """Return a message for every named value that is set and below its limit."""
    return [
        f"{group}.{name} must be at least {limit}, got {value}"
        for name, limit in limits.items()
        if (value := getattr(config, name)) is not None and value < limit
    ]
