"""Node `search`: what `python -m expt -m search=NAME` looks for, where, and how long.

The node is null unless a file of `conf/search` fills it. `space` maps a setting, written as on
the command line, to a distribution in Hydra's sweep grammar: ``choice(a,b)``, ``range(1,5)``,
``interval(0.0,0.3)``, ``tag(log,interval(1e-4,1e-2))``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

VALIDATION, PEAK = "val", "peak_memory"
"""What trials are compared by: validation, in the metric that is monitored, and the peak memory."""
OBJECTIVE = re.compile(rf"{VALIDATION}(/[\w.\-]+)?")
STUDY_NAME = re.compile(r"[\w.\-]+")
AUTO = "auto"
"""`search.n_jobs`: one trial for each device or core; see `expt.search.parallel`."""


class Pruner(Enum):
    """Which trials are ended early, at the end of an epoch; see Optuna's pruners."""

    none = "none"
    median = "median"
    hyperband = "hyperband"
    asha = "asha"


@dataclass
class SearchConfig:
    """Group `search`; the sampler is chosen by ``hydra/sweeper/sampler=tpe``."""

    study: str = "search"  # its name; running it again does what is left of n_trials
    space: dict[str, str] = field(default_factory=dict)  # setting -> distribution
    n_trials: int = 40  # trained trials in all, over every run and worker of the study
    n_jobs: Any = 1  # trained at the same time by this process; auto: one per GPU, or per core
    storage: str | None = None  # a URL, a FILE.journal; None: optuna.db beside the tracking store
    seed: int = 0  # of the sampler
    pruner: Pruner = Pruner.none
    repeats: int = 1  # seeds per trial, from trainer.seed up; the mean is what counts
    objectives: list[str] = field(default_factory=lambda: [VALIDATION])  # or [val, peak_memory]
    presets: list[str] = field(default_factory=list)  # memory presets that are tried first
    enqueue: list[dict[str, Any]] = field(default_factory=list)  # points that are tried first
    warm_start: Any = None  # earlier studies to begin with what they found: a name, or a list
    retry: int = 0  # how often a trial that crashed, was killed or hung is started again
    time_limit_seconds: float | None = None  # of this start; then no trial is begun any more
    trial_time_limit_seconds: float | None = None  # then it hangs, and is killed
    plan_time_limit_seconds: float = 120.0  # for the prediction of one trial
    retrain: int = 0  # how many of the best trials, and the presets, are trained again at the end
    retrain_with: list[str] = field(default_factory=list)  # with these settings: trainer.epochs=30
    test_winner: bool = True  # test the best trial's weights, once, at the end
    trial: int | None = None  # set by the sweeper in the trials it starts

    @property
    def earlier_studies(self) -> list[str]:
        """The names in `warm_start`."""
        if self.warm_start is None:
            return []
        return self.warm_start if isinstance(self.warm_start, list) else [self.warm_start]

    def problems(self) -> list[str]:
        """Return one message per value out of range, and per contradiction."""
        found = [
            f"search.{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("n_trials", 1), ("repeats", 1), ("seed", 0), ("retrain", 0))
            if getattr(self, name) < least
        ]
        whole = isinstance(self.n_jobs, int) and not isinstance(self.n_jobs, bool)
        if self.n_jobs != AUTO and (not whole or self.n_jobs < 1):
            found.append(f"search.n_jobs must be at least 1, or {AUTO}, got {self.n_jobs}")
        if not STUDY_NAME.fullmatch(self.study) or self.study.strip(".") == "":
            found.append(
                f"search.study={self.study!r} names a folder too: letters, digits, dots, dashes "
                "and underscores only"
            )
        if any(not isinstance(name, str) or not name for name in self.earlier_studies):
            found.append(
                f"search.warm_start must be a study's name or a list of them, got {self.warm_start}"
            )
        if self.retrain > 0 and not self.retrain_with:
            found.append(
                f"search.retrain={self.retrain} trains the best again with other settings, and "
                "search.retrain_with names none; give it, like "
                "\"search.retrain_with=['trainer.epochs=30']\""
            )
        if self.retry not in (0, 1):
            found.append(f"search.retry must be 0 or 1, got {self.retry}")
        for name in (
            "time_limit_seconds", "trial_time_limit_seconds", "plan_time_limit_seconds",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                found.append(f"search.{name} must be a positive number, got {value}")
        return found + self._objective_problems()

    def _objective_problems(self) -> list[str]:
        objectives = list(self.objectives)
        known = objectives and OBJECTIVE.fullmatch(objectives[0])
        if not known or objectives[1:] not in ([], [PEAK]):
            return [
                f"search.objectives must be [{VALIDATION}] or [{VALIDATION},{PEAK}], where "
                f"{VALIDATION}/NAME also names the monitored metric, got {objectives}"
            ]
        if len(objectives) > 1 and self.pruner is not Pruner.none:
            return [
                f"search.pruner={self.pruner.value} compares one figure, and "
                f"search.objectives={objectives} has two; set search.pruner=none"
            ]
        if self.repeats > 1 and self.pruner is not Pruner.none:
            return [
                f"search.pruner={self.pruner.value} would compare one seed with the mean of "
                f"search.repeats={self.repeats}; choose one of the two"
            ]
        return []
