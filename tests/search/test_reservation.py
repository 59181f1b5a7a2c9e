from __future__ import annotations

import multiprocessing
import os
import time

import optuna
import pytest
from optuna.trial import TrialState

from expt.run.process import identity, is_alive
from expt.search import reservation
from expt.search.reservation import Reservations, Reserved, counts
from expt.search.space import Space
from expt.search.trial import KIND, STARTED, WORKER

SPACE = Space.parse({"x": "interval(0.0,1.0)"})


@pytest.fixture
def reservations(tmp_path):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    return Reservations(study, SPACE, 3, tmp_path)


def finish(reserved, kind="completed"):
    reserved.trial.set_user_attr(KIND, kind)
    reserved.trial.study.tell(reserved.trial, 1.0)


def test_no_more_trials_than_were_asked_for(reservations):
    taken = [reservations.next() for _ in range(3)]
    assert all(isinstance(one, Reserved) for one in taken)
    assert reservations.next() == "elsewhere", "reserved ones count before they are started"
    for one in taken:
        finish(one)
    assert reservations.next() == "done"


def test_what_was_never_started_does_not_count(reservations):
    for kind in ("predicted_over", "duplicate", "refused"):
        finish(reservations.next(), kind)
    assert isinstance(reservations.next(), Reserved)
    trial = reservations.study.trials[2]
    assert not counts(trial)


def test_a_refused_trial_counts_if_it_was_started(reservations):
    reserved = reservations.next()
    reserved.trial.set_user_attr(STARTED, True)
    finish(reserved, "refused")
    assert counts(reservations.study.trials[0])


def test_a_trial_with_the_values_of_an_earlier_one_is_known(reservations):
    reservations.study.enqueue_trial({"x": 0.5})
    reservations.study.enqueue_trial({"x": 0.5})
    first, second = reservations.next(), reservations.next()
    assert first.duplicate_of is None
    assert second.duplicate_of.number == first.trial.number


def test_nothing_new_when_only_orphans_are_wanted(reservations):
    assert reservations.next(adopt_only=True) == "done"
    mine = reservations.next()
    assert reservations.next(adopt_only=True) == "elsewhere"
    mine.trial.set_user_attr(WORKER, {**identity(), "pid": 2**22 + 1})
    other = Reservations(reservations.study, SPACE, 3, reservations.folder)
    adopted = other.next(adopt_only=True)
    assert adopted.adopted
    assert adopted.trial.number == mine.trial.number


def test_a_worker_that_lives_keeps_its_trials(reservations):
    reservations.next()
    other = Reservations(reservations.study, SPACE, 1, reservations.folder)
    assert other.next() == "elsewhere"


def test_a_worker_elsewhere_is_dead_when_it_was_silent_for_long(reservations, monkeypatch):
    mine = reservations.next()
    mine.trial.set_user_attr(WORKER, {"host": "far", "pid": 1, "started": "1", "beat": 5})
    other = Reservations(reservations.study, SPACE, 1, reservations.folder)
    now = time.monotonic()
    monkeypatch.setattr(reservation.time, "monotonic", lambda: now)
    assert other.next() == "elsewhere"
    now += 170
    assert other.next() == "elsewhere"
    mine.trial.set_user_attr(WORKER, {"host": "far", "pid": 1, "started": "1", "beat": 6})
    now += 20
    assert other.next() == "elsewhere", "it said that it lives"
    now += 181
    assert other.next().adopted


def test_a_process_is_told_from_a_later_one_with_its_number():
    me = identity()
    assert is_alive(me)
    assert not is_alive({**me, "started": "12345"})
    assert not is_alive({**me, "pid": 2**22 + 1})


def reserve(url, folder, count, queue):
    study = optuna.load_study(
        study_name="shared", storage=url, sampler=optuna.samplers.RandomSampler(os.getpid())
    )
    door = Reservations(study, SPACE, count, folder)
    while isinstance(found := door.next(), Reserved):
        finish(found)
        queue.put(found.trial.number)
    queue.put(None)


def test_two_workers_share_a_study_without_doubling_or_losing_a_trial(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(study_name="shared", storage=url)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=reserve, args=(url, tmp_path, 12, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    numbers, ended = [], 0
    while ended < 2:
        number = queue.get(timeout=30)
        ended += number is None
        numbers += [] if number is None else [number]
    for worker in workers:
        worker.join()
    assert sorted(numbers) == list(range(12))
    study = optuna.load_study(study_name="shared", storage=url)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12
