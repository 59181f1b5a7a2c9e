"""Who does which trial, so that workers of one study neither double nor lose one.

All of it happens under a lock on a file in the sweep's directory, which the kernel gives back
when a process is killed. A trial belongs to the worker that its attribute ``worker`` names; one
whose worker is dead is an orphan, and the next worker that looks adopts it, number and all.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from expt.locks import Lock
from expt.result import Outcome
from expt.run.process import identity, is_alive
from expt.search.samplers import SeenStudy
from expt.search.space import Space, same
from expt.search.trial import STARTED, WORKER, kind_of, may_go_well, stored

log = logging.getLogger(__name__)

LOCK_NAME = "sweep.lock"
BEAT_SECONDS = 30.0
"""How often a worker says that it lives, for workers on other machines."""
SILENT_SECONDS = 180.0
"""A worker elsewhere that has not said so for this long, by this machine's clock, is dead."""
STUCK = 5
"""After so many suggestions in a row that were not trained, one is drawn at random."""


@dataclass(frozen=True)
class Reserved:
    """A trial that this worker has to see to its end.

    `adopted` says that another began it; `duplicate_of` that it need not be done.
    """

    trial: Trial
    adopted: bool = False
    duplicate_of: FrozenTrial | None = None


_AT_WORK: set[str] = set()
"""The workers of this process that have not left."""

Nothing = Literal["done", "elsewhere"]
"""Why there is nothing to do: all is finished, or other workers still are at it."""


@dataclass
class Reservations:
    """The door to a study for one worker.

    With `given_only`, points that were put first are tried, and nothing is suggested.
    """

    study: Study
    space: Space
    n_trials: int
    folder: Path
    seed: int = 0
    given_only: bool = False
    untrained_in_a_row: int = 0
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)
    _mine: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.me = {**identity(), "token": uuid.uuid4().hex}
        _AT_WORK.add(self.me["token"])

    def next(self, adopt_only: bool = False) -> Reserved | Nothing:
        """Return an orphan, or else, unless `adopt_only`, a new trial if one is left to do."""
        with self.locked():
            trials = self.study.get_trials(deepcopy=False)
            running = [t for t in trials if t.state is TrialState.RUNNING]
            for orphan in running:
                if orphan.number not in self._mine and not self._alive(orphan):
                    return self._take(Trial(self.study, orphan._trial_id), adopted=True)
            none_left = self.given_only and not waiting(trials)
            if adopt_only or none_left or sum(map(counts, trials)) >= self.n_trials:
                return "elsewhere" if running else "done"
            return self._take(self._ask(), adopted=False)

    def release(self, number: int) -> None:
        """Forget a trial of this worker, which was told, or is left to whoever comes next."""
        self._mine.discard(number)

    def leave(self) -> None:
        """Leave what this worker has to whoever comes next, also in this process.

        Raises whatever the study's storage raises; another worker of this process comes next even
        then.
        """
        _AT_WORK.discard(self.me["token"])
        with self.locked():
            for number in sorted(self._mine):
                trial = Trial(self.study, stored(self.study, number)._trial_id)
                if self.owns(trial):
                    trial.set_user_attr(WORKER, None)
        self._mine.clear()

    def beat(self, trial: Trial) -> bool:
        """Say to workers on other machines that this trial is being seen to.

        False: one of them took this worker for dead, and the trial is its own now.
        """
        with self.locked():
            mine = self.owns(trial)
            if mine:
                trial.set_user_attr(WORKER, {**self.me, "beat": round(time.time())})
            return mine

    def owns(self, trial: Trial) -> bool:
        """Tell, under the lock, whether a trial is still this worker's to tell."""
        known = stored(self.study, trial.number)
        worker = known.user_attrs.get(WORKER) or {}
        same = all(worker.get(name) == value for name, value in self.me.items())
        return same and not known.state.is_finished()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the sweep's directory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder / LOCK_NAME)
        lock.acquire(wait=True, required=True)
        try:
            yield
        finally:
            lock.release()

    def _ask(self) -> Trial:
        """Ask for a trial; now and then at random, when the sampler sees no way on."""
        distributions = dict(self.space.distributions)
        stuck = self.untrained_in_a_row and self.untrained_in_a_row % STUCK == 0
        asked = SeenStudy(self.study)
        if stuck and not isinstance(self.study.sampler, optuna.samplers.GridSampler):
            drawn = len(self.study.get_trials(deepcopy=False))  # or the same would come again
            asked.sampler = RandomSampler(self.seed + drawn)
        trial = asked.ask(distributions)
        trial.study = self.study
        return trial

    def _take(self, trial: Trial, adopted: bool) -> Reserved:
        for name, one in self.space.distributions.items():
            suggest(trial, name, one)  # what a killed worker had not come to
        trial.set_user_attr(WORKER, {**self.me, "beat": round(time.time())})
        self._mine.add(trial.number)
        return Reserved(trial, adopted, self._earlier(trial))

    def _earlier(self, trial: Trial) -> FrozenTrial | None:
        """Return a trial before this one with the same values, which was or will be done."""
        params = trial.params
        for other in self.study.get_trials(deepcopy=False):
            if other.number >= trial.number:
                break
            kind = kind_of(other)
            if kind is None and other.state.is_finished():
                continue  # ended by someone else's hand, so that nothing is known of it
            if self.given_only and may_go_well(other):
                continue
            if same(other.params, params) and kind is not Outcome.duplicate:
                return other
        return None

    def _alive(self, trial: FrozenTrial) -> bool:
        """Tell whether the worker that a trial names still sees to it."""
        worker = trial.user_attrs.get(WORKER)
        if worker is None:
            return False  # left, or killed before it could sign; nobody else is in here now
        if worker["host"] == self.me["host"]:
            mine = all(worker[name] == self.me[name] for name in ("pid", "started"))
            return worker.get("token") in _AT_WORK if mine else is_alive(worker)
        now = time.monotonic()
        beat, since = self._seen.get(trial.number, (None, now))
        if beat != worker["beat"]:
            since = now
        self._seen[trial.number] = (worker["beat"], since)
        return now - since < SILENT_SECONDS


@contextmanager
def beating(beat: Callable[[], object] | None, seconds: float) -> Iterator[None]:
    """Call `beat` every so many seconds from a thread, while something else does not return."""
    over = threading.Event()

    def go_on() -> None:
        while beat is not None and not over.wait(seconds):
            try:
                beat()
            except Exception as error:  # the storage; whoever tells it next says so
                log.info("no sign of life was given: %s", error)

    thread = threading.Thread(target=go_on, name="expt-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def suggest(trial: Trial, name: str, one: BaseDistribution) -> None:
    """Give a trial its value of a setting, if it has none yet."""
    if isinstance(one, CategoricalDistribution):
        trial.suggest_categorical(name, one.choices)
    elif isinstance(one, IntDistribution):
        trial.suggest_int(name, one.low, one.high, step=one.step, log=one.log)
    else:
        assert isinstance(one, FloatDistribution)
        trial.suggest_float(name, one.low, one.high, step=one.step, log=one.log)


def waiting(trials: Sequence[FrozenTrial]) -> bool:
    """Tell whether a point is to be tried before the sampler is asked again."""
    return any(trial.state is TrialState.WAITING for trial in trials)


def counts(trial: FrozenTrial) -> bool:
    """Tell whether a trial is one of `search.n_trials`: it was started, or may yet be."""
    if trial.state is TrialState.RUNNING:
        return True
    if not trial.state.is_finished():
        return False
    kind = kind_of(trial)
    return kind is not None and (kind.columns.counts or bool(trial.user_attrs.get(STARTED)))
