"""The loop of a search: reserve, predict, start, watch, tell; until `search.n_trials` are done.

    Search(...).run() -> SweepSummary

It knows Optuna and processes, and nothing of models: what a trial is, is a command line. All it
needs from elsewhere is handed to it (`Jobs`), and everything that must survive is in the study
and in the trials' folders, so that it can be killed at any point and started again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial, Trial

from expt.config.search_node import SearchConfig
from expt.result import Outcome
from expt.run.process import kill_leftover
from expt.search.ending import move_aside
from expt.search.exhaustion import (
    LEAST_SUGGESTIONS,
    LEAST_TRIALS,
    Nearest,
    all_tried,
    lighter_point,
    nothing_fitted,
    nothing_found,
    over_budget,
)
from expt.search.metric import metric_of
from expt.search.records import Records
from expt.search.reservation import (
    BEAT_SECONDS,
    Reservations,
    Reserved,
    beating,
    counts,
    waiting,
)
from expt.search.runner import Job, Runner, Running
from expt.search.space import Space, settings_lines
from expt.search.study import DATA, answering
from expt.search.trial import (
    RESUMED_AT,
    RETRIED,
    STARTED,
    TECHNIQUES,
    Prediction,
    TrialOutcome,
    stored,
    technique_lines,
    tell_study,
    with_techniques,
)
from expt.search.winner import SweepSummary, best_trial, summarize, told_line
from expt.training.interruption import Interruption, Stopped

POLL_SECONDS = 0.05
WAIT_SECONDS = 0.5
"""Between two looks at a study whose last trials other workers have."""
UNTRAINED_PER_TRIAL = 50
"""Suggestions in a row that are not trained, per trial asked for, before nothing is said to fit."""
MOST_UNTRAINED = 1000
MOST_DUPLICATES = 100
"""Suggestions in a row that were tried before, after which nothing new is expected."""


class Jobs(Protocol):
    """What a search asks of the rest of the program."""

    budget_bytes: int | None

    def lines(self, number: int, params: Sequence[str]) -> list[str]:
        """Return the settings of a trial."""

    def predict(self, lines: Sequence[str]) -> Prediction | None:
        """Return what a plan says, None if none can be made."""

    def advise(self, lines: Sequence[str]) -> str | None:
        """Return the changes that would make a trial fit, None if there are none."""


@dataclass
class UnderWay:
    """A trial that this worker has started."""

    trial: Trial
    running: Running
    job: Job
    prediction: Prediction | None
    reported: set[int]
    pruned: bool = False


@dataclass
class Search:
    """One worker of a search.

    Args:
        config: node `search`.
        space: what is varied.
        reservations: the door to the study.
        runner: starts trials.
        jobs: composes, predicts.
        records: what is kept besides the study.
        folder: of the search.
        seeds: of every trial, `search.repeats` of them.
        storage: as it is shown.
        say: prints a line.

    """

    config: SearchConfig
    space: Space
    reservations: Reservations
    runner: Runner
    jobs: Jobs
    records: Records
    folder: Path
    seeds: Sequence[int]
    storage: str = ""
    say: Callable[[str], None] = print
    under_way: list[UnderWay] = field(default_factory=list)
    nearest: Nearest = field(default_factory=Nearest)
    _copies: list[tuple[Trial, FrozenTrial]] = field(default_factory=list)
    _untrained: int = 0
    _duplicates: int = 0
    _said_why: bool = False
    _judged: Trial | None = None
    _lost: set[int] = field(default_factory=set)
    _beaten: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.study = self.reservations.study
        self.metric = metric_of(self.study)
        self.data = self.study.user_attrs.get(DATA)
        self.limited = self.jobs.budget_bytes is not None
        limit = self.config.time_limit_seconds
        self._until = math.inf if limit is None else time.monotonic() + limit

    def run(self) -> SweepSummary:
        """Do what is left of the study, or the time is enough for, and return how it stands.

        Raises:
            SearchError: no trial is inside the budget.
            Stopped: SIGINT or SIGTERM; what ran was asked to save and is left for the next time.
            StorageError: the study's storage went away.

        """
        try:
            with answering(self.study.study_name), Interruption() as interruption:
                self._loop(interruption)
        finally:
            for one in self.under_way:
                one.running.kill()
            with suppress(Exception):  # without its storage: see `Reservations.leave`
                self.reservations.leave()
        summary = self.summary()
        if summary.best is None:
            trials = self.study.get_trials(deepcopy=False)
            left = sum(map(counts, trials)) < self.reservations.n_trials
            limit = self.config.time_limit_seconds if left and self._out_of_time() else None
            raise nothing_found(self.study, self.nearest, self.jobs, self.space, limit)
        return summary

    def summary(self) -> SweepSummary:
        """Write ``sweep.json`` and return what it says."""
        # Under the lock: of two workers, the one that writes last must be the one that knows more.
        with self.reservations.locked():
            found = summarize(
                self.study, self.config.n_trials, self.jobs.budget_bytes, self.storage
            )
            self.records.summary(found)
        return found

    def beat(self) -> None:
        """Say to workers on other machines that what runs, or waits here, is being seen to."""
        for one in list(self.under_way):
            if not self.reservations.beat(one.trial):
                self._lost.add(one.trial.number)
                one.running.kill()  # over a launcher, before its next seed is sent
        waiting = [copy for copy, _ in self._copies]
        waiting += [] if self._judged is None else [self._judged]
        for trial in waiting:
            if not self.reservations.beat(trial):
                self._lost.add(trial.number)

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / f"trial_{number:03d}"

    def _loop(self, interruption: Interruption) -> None:
        look_again = 0.0
        while True:
            moved = self._poll(interruption.received is not None)
            if interruption.received is not None:
                self._stop(interruption.received)
            if len(self.under_way) >= self.config.n_jobs:
                self.runner.flush()
            elif moved or time.monotonic() >= look_again:
                found = self._begin()
                if found == "done" and not self.under_way and not self._copies:
                    return
                if found == "begun":
                    continue
                self.runner.flush()
                look_again = time.monotonic() + WAIT_SECONDS
            time.sleep(POLL_SECONDS)

    def _begin(self) -> str:
        """Take one step towards another trial; say ``begun``, or why there is none."""
        self._tell_copies()
        exhausted = self._exhausted()
        if self._out_of_time():
            return "done"  # what a dead worker left, too, is for the next start
        reserved = self.reservations.next(adopt_only=exhausted)
        if not isinstance(reserved, Reserved):
            return reserved
        trial = reserved.trial
        started = bool(trial.user_attrs.get(STARTED))
        folder = self.trial_folder(trial.number)
        if reserved.adopted:
            kill_leftover(folder)
        if not started and (aside := move_aside(folder)):
            self.say(
                f"trial {trial.number}: {folder} was there, of another study; it is {aside} now"
            )
        if reserved.duplicate_of is not None and not started:
            self._copies.append((trial, reserved.duplicate_of))
            self._tell_copies()
            return "begun"
        self._duplicates = 0
        lines = [
            *self.jobs.lines(trial.number, self.space.lines(trial.params)),
            *technique_lines(trial),  # of one that is gone on with
        ]
        self._judged = trial
        with beating(self.beat, BEAT_SECONDS):
            prediction = self.jobs.predict(lines)
        self._judged = None
        chosen = {} if prediction is None else prediction.techniques
        self.nearest.note(trial, [*lines, *settings_lines(chosen)], prediction)
        if prediction is not None and not started:
            kind = None
            if prediction.refusal is not None:
                kind = Outcome.refused
            elif prediction.exceeds(self.jobs.budget_bytes):
                kind = Outcome.predicted_over
            if kind is not None:
                self._count_untrained()
                self._tell(trial, TrialOutcome(kind, error=prediction.refusal), prediction)
                return "begun"
        self._start(trial, lines, prediction)
        return "begun"

    def _start(self, trial: Trial, lines: list[str], prediction: Prediction | None) -> None:
        if not self.reservations.beat(trial):
            self._forget(trial)
            return
        self._untrained = self.reservations.untrained_in_a_row = 0
        attempts = int(trial.user_attrs.get("attempts", 0)) + 1
        if prediction is not None and prediction.techniques:
            trial.set_user_attr(TECHNIQUES, with_techniques(trial, prediction))
        lines = [*lines, *(one for one in technique_lines(trial) if one not in lines)]
        trial.set_user_attr(STARTED, True)
        trial.set_user_attr("attempts", attempts)
        if attempts > 1:
            trial.set_user_attr(RESUMED_AT, time.time())
        folder = self.trial_folder(trial.number)
        job = Job(
            trial.number,
            lines,
            folder,
            self.seeds,
            prediction.plan if prediction is not None else None,
            self.jobs.budget_bytes,
            self.config.trial_time_limit_seconds,
            metric=self.metric,
            data=self.data,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.records.start(trial.number, folder, own_process=len(self.seeds) == 1)
        running = self.runner.start(job)
        # One that is gone on with tells its last epoch again.
        reported = set(stored(self.study, trial.number).intermediate_values)
        self.under_way.append(UnderWay(trial, running, job, prediction, reported))

    def _poll(self, stopping: bool = False) -> bool:
        """Look after what runs; return whether anything ended."""
        ended = False
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            self.beat()
        for one in list(self.under_way):
            if one.trial.number in self._lost:
                self._lose(one)
                continue
            outcome = one.running.poll()
            if outcome is None:
                try:
                    self._watch(one)
                except UpdateFinishedTrialError:
                    self._lose(one)
                continue
            self.under_way.remove(one)  # what has told its end is not asked again
            if stopping and outcome.kind is Outcome.killed:
                continue  # by what stops this worker, and the next one goes on with it
            ended = True
            retried = int(one.trial.user_attrs.get(RETRIED, 0))
            if outcome.kind.columns.retry and retried < self.config.retry:
                if not self.reservations.beat(one.trial):
                    self._forget(one.trial)
                    continue
                one.trial.set_user_attr(RETRIED, retried + 1)
                said = f"{outcome.kind.words} ({outcome.error}), once more"
                self.say(f"trial {one.trial.number}: {said}")
                self._start(one.trial, list(one.job.lines), one.prediction)
                continue
            self._tell(one.trial, outcome, one.prediction, folder=one.job.folder)
        if ended:
            self._tell_copies()
        return ended

    def _lose(self, one: UnderWay) -> None:
        """End a trial that another worker has taken over, before both write to its folder."""
        one.running.kill()
        self.under_way.remove(one)
        self._forget(one.trial)

    def _forget(self, trial: Trial) -> None:
        self._lost.discard(trial.number)
        self.reservations.release(trial.number)
        self.say(
            f"trial {trial.number}: it was ended from elsewhere, or another worker took it over "
            "after this one had been silent for too long; it is left as it is"
        )

    def _watch(self, one: UnderWay) -> None:
        """Report a trial's epochs, and end it if the pruner says so."""
        if len(self.config.objectives) > 1 or one.pruned or not self.runner.prunes:
            return
        for epoch, value in one.running.epochs():
            if epoch not in one.reported:
                one.reported.add(epoch)
                one.trial.report(value, epoch)
            if one.trial.should_prune():
                one.pruned = True
                one.running.stop("pruned")

    def _tell(
        self,
        trial: Trial,
        outcome: TrialOutcome,
        prediction: Prediction | None,
        folder: Path | None = None,
        copy_of: FrozenTrial | None = None,
    ) -> None:
        """Tell the study and the records how a trial ended, if it still is this worker's."""
        folder = folder or self.trial_folder(trial.number)
        with self.reservations.locked():
            if not self.reservations.owns(trial):
                self._forget(trial)
                return
            tell_study(
                self.study,
                trial,
                outcome,
                prediction,
                self.jobs.budget_bytes,
                self.config.objectives,
                folder,
                copy_of,
            )
        self.reservations.release(trial.number)
        told = stored(self.study, trial.number)
        self.records.told(told, folder)
        best = best_trial(self.study.get_trials(deepcopy=False), self.limited, self.metric)
        is_best = best is not None and best.number == told.number
        self.say(told_line(told, is_best, self.metric))
        self.summary()

    def _tell_copies(self) -> None:
        """Tell trials that repeat another one, once that one has ended."""
        waiting = self._copies
        self._copies = []
        for trial, original in waiting:
            if trial.number in self._lost:
                self._forget(trial)
                continue
            now = stored(self.study, original.number)
            if not now.state.is_finished():
                self._copies.append((trial, original))
                continue
            self._duplicates += 1
            self._count_untrained()
            self._tell(trial, TrialOutcome(Outcome.duplicate), None, copy_of=now)

    def _count_untrained(self) -> None:
        self._untrained += 1
        self.reservations.untrained_in_a_row = self._untrained

    def _exhausted(self) -> bool:
        """Tell whether the time is up, or nothing new, or nothing that fits, is to be expected."""
        reason = None
        trials = self.study.get_trials(deepcopy=False)
        if self._out_of_time():
            reason = f"search.time_limit_seconds={self.config.time_limit_seconds:g} have passed"
        elif not self.reservations.given_only and all_tried(trials, self.space):
            reason = f"all {self.space.size} points of the space were tried"
        elif self._duplicates >= MOST_DUPLICATES:
            reason = f"{self._duplicates} suggestions in a row were tried before; nothing is new"
        elif self._untrained >= min(UNTRAINED_PER_TRIAL * self.config.n_trials, MOST_UNTRAINED):
            reason = f"{self._untrained} suggestions in a row were not trained"
        elif self._nothing_fits(trials):
            over = len(over_budget(trials))
            reason = f"{over} exceed the budget, and so does the lightest with one setting changed"
        if reason is not None and not self._said_why:
            self._said_why = True
            self.say(f"no more trials: {reason}")
        return reason is not None

    def _out_of_time(self) -> bool:
        return time.monotonic() >= self._until

    def _nothing_fits(self, trials: Sequence[FrozenTrial]) -> bool:
        """Tell whether nothing can be expected to fit; before that, try what is the lightest."""
        # A grid tries every point in an order of its own, and a retraining those it was given.
        closed = isinstance(self.study.sampler, GridSampler) or self.reservations.given_only
        if len(trials) < LEAST_SUGGESTIONS or closed or not nothing_fitted(trials):
            return False
        if waiting(trials) or sum(map(counts, trials)) >= self.reservations.n_trials:
            return False
        if point := lighter_point(trials, self.space):
            self.study.enqueue_trial(point)
        return point is None and len(over_budget(trials)) >= LEAST_TRIALS

    def _stop(self, number: int) -> None:
        """Let what runs save and end, leave it to the next worker, and say what was found."""
        self.say(f"stopping: {len(self.under_way)} trials save and end; again to not wait for them")
        for one in self.under_way:
            one.running.stop("signal")
        while self.under_way:
            self.under_way = [one for one in self.under_way if one.running.poll() is None]
            time.sleep(POLL_SECONDS)
        self.summary()
        raise Stopped(number)
