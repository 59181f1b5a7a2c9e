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
class WatchConfig:
    """Node of the task `watch`."""

    run: str | None = None  # directory of a run that is going on
    pid: int | None = None  # or any process of this machine
    interval: float = 2.0  # seconds between two looks
    duration: float | None = None  # seconds after which to end; None: when the process does
    alarm: float = 0.9  # part of a limit above which to warn

    def problems(self) -> list[str]:
        """Return one message per value out of range, and per contradiction."""
        found = []
        if (self.run is None) == (self.pid is None):
            given = "neither" if self.run is None else "both"
            found.append(
                "watch.run must be the directory of a run, or watch.pid the number of a process; "
                f"got {given}"
            )
        if self.pid is not None and self.pid < 1:
            found.append(f"watch.pid must be the number of a process, got {self.pid}")
        if not (math.isfinite(self.interval) and self.interval >= 0.1):
            found.append(f"watch.interval must be 0.1 seconds or more, got {self.interval}")
        if self.duration is not None and not self.duration > 0:
            found.append(f"watch.duration must be seconds above 0 or null, got {self.duration}")
        if not 0 < self.alarm <= 1:
            found.append(f"watch.alarm must be above 0 and at most 1, like 0.9, got {self.alarm}")
        return found


@dataclass
class PredictConfig:
    """Node of the task `predict`."""

    run: str | None = None  # directory of the run whose best weights predict
    split: str | None = None  # train, val or test of the run's own data; of other data, all is test
    format: str | None = None  # npz, or another that the data can write, like parquet; None: npz
    plots: bool = True  # the figures of the data, if it has any

    def problems(self) -> list[str]:
        """Return one message per value that is missing or not one of those allowed."""
        found = [] if self.run else ["predict.run must be the directory of a run, got none"]
        if self.split not in (None, "train", "val", "test"):
            found.append(f"predict.split={self.split!r} must be train, val, test or null")
        return found


@dataclass
class RolloutConfig:
    """Node of the task `rollout`."""

    run: str | None = None  # directory of the run whose best weights act
    tasks: list[str] | None = None  # of the simulator; None: those of the run's data
    seeds: int = 10  # trials of each task, in scenes that the data do not have
    steps: int = 200  # after which a trial has failed
    execute: int | None = None  # steps of a prediction before the next; None: half of them
    exchange_sentences: bool = True  # also try each task with the sentence of another
    videos: int = 1  # trials of each task that are written as mp4
    at_once: int = 20  # trials that the model decides for together; each takes 0.1 GB

    def problems(self) -> list[str]:
        """Return one message per value that is missing or out of range."""
        found = [] if self.run else ["rollout.run must be the directory of a run, got none"]
        limits = {"seeds": 1, "steps": 1, "execute": 1, "videos": 0, "at_once": 1}
        return found + at_least("rollout", self, **limits)


@dataclass
class ExportConfig:
    """Node of the task `export`."""

    run: str | None = None  # directory of the run whose best weights are exported
    batch_size: int = 2  # of the example that the program is traced with; any number runs
    onnx: bool = True  # also as ONNX, where its packages are installed
    tolerance: float = 1e-5  # that the program's output may be off by, relative to the largest

    def problems(self) -> list[str]:
        """Return one message per value that is missing or out of range."""
        found = [] if self.run else ["export.run must be the directory of a run, got none"]
        found += at_least("export", self, batch_size=2)  # 1 would be a constant of the program
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            found.append(f"export.tolerance must be a positive number, got {self.tolerance}")
        return found


@dataclass
class FitConfig:
    """Node of the task `fit_batch` and of ``data.batch_size=auto``."""

    margin: float | None = None  # of the budget: what may be taken; None: 0.9 on CPU, 0.952 on CUDA
    confirm: bool = True  # two real steps with what was found, where the device is here
    max_batch: int = 1024  # the largest batch to look for

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = at_least("fit", self, max_batch=1)
        if self.margin is not None and not 0 < self.margin <= 1:
            found.append(
                f"fit.margin must be above 0 and at most 1, got {self.margin}; try fit.margin=0.9"
            )
        return found


@dataclass
class AllocateConfig:
    """Node of the task `allocate`."""

    devices: list[int] = field(default_factory=list)  # also over so many cards, [2,4,8] say

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        if all(count > 1 for count in self.devices):
            return []
        return [f"allocate.devices must be counts of cards above 1, like [2,4]; got {self.devices}"]


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
