"""A search without processes: trials are functions of their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from expt.config.schema import TrackingConfig
from expt.config.search_node import SearchConfig
from expt.job import Metric
from expt.result import Outcome
from expt.search.loop import Search
from expt.search.metric import EARLIER, objectives_of
from expt.search.records import Records
from expt.search.reservation import Reservations
from expt.search.runner import Job, Stop
from expt.search.samplers import make_pruner, make_sampler
from expt.search.space import Space
from expt.search.study import open_study
from expt.search.trial import Prediction, TrialOutcome

BUDGET = 100 * 1024**2
SPACE = {"x": "interval(0.0,1.0)", "width": "choice(8,16,32)"}
Params = Mapping[str, Any]


def parsed(lines: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a trial, numbers as numbers."""
    found: dict[str, Any] = {}
    for line in lines:
        name, _, text = line.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


class FakeTrial:
    """Ends at the second look; tells its epochs at the first."""

    def __init__(
        self, job: Job, outcome: TrialOutcome, epochs: Sequence[tuple[int, float]]
    ) -> None:
        self.job, self.outcome, self._epochs = job, outcome, list(epochs)
        self.looks = 0
        self.stopped: Stop | None = None
        self.killed = False

    def poll(self) -> TrialOutcome | None:
        self.looks += 1
        if self.stopped == "pruned":
            return TrialOutcome(Outcome.pruned, peak_bytes=1, demand_bytes=1)
        return self.outcome if self.looks > 1 + len(self._epochs) or self.stopped else None

    def epochs(self) -> list[tuple[int, float]]:
        return [self._epochs.pop(0)] if self._epochs else []

    def stop(self, why: Stop) -> None:
        self.stopped = why

    def kill(self) -> None:
        self.killed = True


class FakeRunner:
    """Starts `FakeTrial`s and keeps them."""

    prunes = True

    def __init__(self, objective: Callable[[Params], TrialOutcome]) -> None:
        self.objective = objective
        self.epochs: Callable[[Params], Sequence[tuple[int, float]]] = lambda params: ()
        self.trials: list[FakeTrial] = []
        self.most_at_once = 0

    def start(self, job: Job) -> FakeTrial:
        params = parsed(job.lines)
        trial = FakeTrial(job, self.objective(params), self.epochs(params))
        self.trials.append(trial)
        return trial

    def flush(self) -> None:
        """Do nothing."""


class FakeJobs:
    """Predicts by a function of the settings."""

    def __init__(
        self,
        predict: Callable[[Params], Prediction | None] = lambda params: None,
        budget_bytes: int | None = BUDGET,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._predict = predict
        self.predicted = 0

    def lines(self, number: int, params: Sequence[str]) -> list[str]:
        return [*params, f"search.trial={number}"]

    def predict(self, lines: Sequence[str]) -> Prediction | None:
        self.predicted += 1
        return self._predict(parsed(lines))

    def advise(self, lines: Sequence[str]) -> str | None:
        return "memory.activation_checkpointing=true (1.0 MiB)"


def fine(params: Params) -> TrialOutcome:
    """A trial inside the budget whose error is x."""
    return TrialOutcome(Outcome.completed, params["x"] + 1, 1000, 1000, seconds=1.0)


def peak_of_width(params: Params) -> Prediction:
    """A prediction of 10 MiB per unit of width, to 5 %."""
    peak = int(params["width"] * 10 * 1024**2)
    return Prediction(peak, peak, (int(peak * 0.95), int(peak * 1.05)), {"peak_bytes": peak})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Search]]:
    """Make a search on a storage in memory, or on one that is given."""
    said: list[str] = []

    def make(
        objective: Callable[[Params], TrialOutcome] = fine,
        predict: Callable[[Params], Prediction | None] = lambda params: None,
        sampler: Mapping[str, Any] | None = None,
        storage: Any = None,
        space: Mapping[str, str] = SPACE,
        budget_bytes: int | None = BUDGET,
        folder: Path | None = None,
        metric: Metric = EARLIER,
        **settings: Any,
    ) -> Search:
        config = SearchConfig(**{"study": "test", "n_trials": 6, **settings})
        parsed_space = Space.parse(space)
        folder = folder or tmp_path / "sweep"
        node = sampler or {"_target_": "optuna.samplers.RandomSampler", "seed": None}
        made = make_sampler(node, parsed_space, config.seed, len(config.objectives))
        study = open_study(
            config.study,
            storage or optuna.storages.InMemoryStorage(),
            made,
            make_pruner(config.pruner, 3),
            objectives_of(config.objectives, metric),
            metric,
            {"space": parsed_space.as_json()},
        )
        jobs = FakeJobs(predict, budget_bytes)
        return Search(
            config,
            parsed_space,
            Reservations(study, parsed_space, config.n_trials, folder),
            FakeRunner(objective),
            jobs,
            Records(TrackingConfig(), folder, config.study, metric),
            folder,
            [0],
            say=said.append,
        )

    make.said = said  # type: ignore[attr-defined]
    yield make


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often: nothing here takes time."""
    from expt.search import loop as search

    monkeypatch.setattr(search, "POLL_SECONDS", 0.0005)
    monkeypatch.setattr(search, "WAIT_SECONDS", 0.001)
