"""The loop, with trials that are functions; processes are in tests/test_searching.py."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState

from expt.config.search_node import Pruner
from expt.errors import SearchError, StorageError
from expt.job import Metric
from expt.result import Outcome
from expt.run.process import identity
from expt.search import loop
from expt.search.reservation import WORKER
from expt.search.trial import KIND, STARTED, Prediction, TrialOutcome, kind_of
from expt.search.winner import SweepSummary, wall_seconds
from expt.training.interruption import Stopped
from expt.units import MIB

MAPPED = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "qmc": "QMCSampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
    "grid": "GridSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
}


def fine(params):
    return TrialOutcome(Outcome.completed, params["x"] + 1, 1000, 1000, seconds=1.0)


def by_width(params):
    """Predict 5 MiB per unit of width, to 5 %: 32 is over a budget of 100 MiB."""
    peak = int(params["width"] * 5 * MIB)
    return Prediction(peak, peak, (int(peak * 0.95), int(peak * 1.05)), {"peak_bytes": peak})


def kinds(search):
    return [trial.user_attrs.get(KIND) for trial in search.study.trials]


def states(search):
    return [trial.state for trial in search.study.trials]


@pytest.fixture
def clock(monkeypatch):
    """The time that a search sees, which a test moves on."""
    shown = SimpleNamespace(seconds=time.monotonic())
    own = SimpleNamespace(
        monotonic=lambda: shown.seconds, time=time.time, sleep=lambda seconds: None
    )
    monkeypatch.setattr(loop, "time", own)
    return shown


@pytest.mark.parametrize("name", MAPPED)
def test_every_sampler_runs_a_study(make, name):
    package = "optuna.samplers"
    if name.startswith("nsga"):
        package = "hydra_plugins.hydra_optuna_sweeper._impl"
        target = f"{package}.create_{name}_sampler"
    else:
        target = f"{package}.{MAPPED[name]}"
    node = {"_target_": target, "seed": None}
    space = {"x": "interval(0.0,1.0)", "width": "choice(8,16,32)"}
    if name == "grid":
        node["_partial_"] = True
        space = {"x": "choice(0.1,0.2,0.3,0.4,0.5)", "width": "choice(8,16,32)"}
    if name in ("tpe", "gp"):
        node["n_startup_trials"] = 6
    search = make(fine, by_width, node, space=space, n_trials=8)
    summary = search.run()
    assert summary.finished == 8
    assert type(search.study.sampler).__name__ == MAPPED[name]
    assert summary.best["params"]["width"] in (8, 16)
    infeasible = [t for t in search.study.trials if t.user_attrs[KIND] == "predicted_over"]
    assert summary.infeasible_predicted == len(infeasible)
    assert all(trial.params["width"] == 32 for trial in infeasible)
    assert all(trial.constraints["peak_memory"] == pytest.approx(60 / 1024) for trial in infeasible)
    assert len(search.runner.trials) == 8, "what cannot fit is not started"


def test_what_is_predicted_over_by_less_than_the_interval_is_measured(make):
    def close(params):
        peak = 102 * MIB
        return Prediction(peak, peak, (98 * MIB, 106 * MIB), {})

    search = make(fine, close, n_trials=2)
    assert search.run().finished == 2
    assert kinds(search) == ["completed"] * 2
    # Measured wins over predicted.
    assert search.study.trials[0].constraints["peak_memory"] < 0


@pytest.mark.parametrize(
    ("kind", "state", "constraint"),
    [
        ("out_of_memory", TrialState.PRUNED, 5 / 1024),
        ("over_budget", TrialState.COMPLETE, 50 / 1024),
        ("failed", TrialState.FAIL, -20 / 1024),
        ("diverged", TrialState.FAIL, -20 / 1024),
        ("timeout", TrialState.FAIL, -20 / 1024),
        ("killed", TrialState.FAIL, -20 / 1024),
        ("refused", TrialState.FAIL, -20 / 1024),
    ],
)
def test_a_trial_that_goes_wrong_costs_that_trial_alone(make, kind, state, constraint):
    bad = {
        "out_of_memory": TrialOutcome(
            Outcome.out_of_memory, excess_bytes=5 * MIB, error="memory ran out"
        ),
        "over_budget": TrialOutcome(Outcome.over_budget, 0.5, 150 * MIB, 150 * MIB),
    }

    def objective(params):
        if search.study.trials[-1].number == 1:
            return bad.get(kind, TrialOutcome(Outcome(kind), error="as it goes"))
        return fine(params)

    def predict(params):
        peak = 80 * MIB
        return Prediction(peak, peak, (79 * MIB, 81 * MIB), {})

    search = make(objective, predict, n_trials=4)
    summary = search.run()
    assert summary.finished == 4
    assert [t.user_attrs[KIND] for t in search.study.trials].count(kind) == 1
    trial = search.study.trials[1]
    assert trial.state is state
    assert trial.constraints["peak_memory"] == pytest.approx(constraint)
    assert summary.best["trial"] != 1
    failed = kind in ("failed", "diverged", "timeout", "killed", "refused")
    assert (summary.failed, summary.infeasible_measured) == (int(failed), int(not failed))


@pytest.mark.parametrize("fits", [True, False])
def test_what_another_study_left_in_a_trials_folder_is_moved_aside(make, tmp_path, fits):
    """Its complete result would be taken for that of the trial, also where it never starts."""

    big = 10**12

    def predict(params):
        return None if fits or params["x"] < 0.5 else Prediction(big, big, (big, big), {})

    search = make(n_trials=2, n_jobs=2, predict=predict)
    for x in (0.25, 0.75, 0.375):
        search.study.enqueue_trial({"x": x, "width": 8})
    old = search.trial_folder(1) / "result.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    search.run()
    assert not old.exists()
    assert (search.folder / "aside_trial_001_1/result.json").read_text() == "{}"
    assert not (search.folder / "aside_trial_000_1").exists()


def test_a_kill_that_was_predicted_to_come_is_for_lack_of_memory(make):
    def over(params):
        return Prediction(101 * MIB, 101 * MIB, (95 * MIB, 110 * MIB), {})

    search = make(lambda params: TrialOutcome(Outcome.killed, error="SIGKILL"), over, n_trials=1)
    with pytest.raises(SearchError):
        search.run()
    (trial,) = search.study.trials
    assert trial.state is TrialState.PRUNED
    assert trial.constraints["peak_memory"] == pytest.approx(1 / 1024)


def test_a_trial_is_started_again_once_if_that_is_wanted(make):
    starts = []

    def objective(params):
        starts.append(params["search.trial"])
        return TrialOutcome(Outcome.failed, error="x") if len(starts) == 1 else fine(params)

    search = make(objective, n_trials=2, retry=1)
    assert search.run().failed == 0
    assert starts == [0, 0, 1]
    assert search.study.trials[0].user_attrs["attempts"] == 2


def test_without_retry_it_is_told_at_once(make):
    def objective(params):
        return TrialOutcome(Outcome.failed) if params["search.trial"] == 0 else fine(params)

    search = make(objective, n_trials=2)
    assert search.run().failed == 1
    assert len(search.runner.trials) == 2


def test_what_diverges_is_not_started_again(make):
    def objective(params):
        return TrialOutcome(Outcome.diverged) if params["search.trial"] == 0 else fine(params)

    search = make(objective, n_trials=2, retry=1)
    search.run()
    assert len(search.runner.trials) == 2


def test_the_same_point_is_not_trained_twice(make):
    space = {"x": "choice(0.1,0.2)", "width": "choice(8,16)"}
    search = make(fine, n_trials=50, space=space)
    summary = search.run()
    assert summary.finished == 4
    assert len(search.runner.trials) == 4
    assert summary.duplicates == kinds(search).count("duplicate") > 0
    assert any("all 4 points of the space were tried" in line for line in make.said)
    for trial in search.study.trials:
        if trial.user_attrs[KIND] == "duplicate":
            original = search.study.trials[trial.user_attrs["duplicate_of"]]
            assert trial.values == original.values
            assert trial.params == original.params


def test_a_copy_of_a_trial_that_runs_waits_for_its_end(make):
    search = make(fine, n_trials=3, n_jobs=2)
    point = {"x": 0.25, "width": 8}
    search.study.enqueue_trial(point)
    search.study.enqueue_trial(point)
    summary = search.run()
    assert summary.finished == 3
    assert kinds(search)[:2] == ["completed", "duplicate"]
    assert search.study.trials[1].values == search.study.trials[0].values == [1.25]


def test_trials_run_at_the_same_time_without_waiting_for_the_slowest(make):
    search = make(fine, n_trials=6, n_jobs=2)
    order = []
    start = search.runner.start

    def slow_first(job):
        trial = start(job)
        if job.number == 0:
            trial._epochs = [(epoch, 1.0) for epoch in range(1, 40)]
        order.append(job.number)
        return trial

    search.runner.start = slow_first
    tell = search.study.tell
    told = []
    search.study.tell = lambda trial, *rest: (told.append(trial.number), tell(trial, *rest))
    search.run()
    assert sorted(order) == sorted(told) == list(range(6))
    assert told[-1] == 0, "the others did not wait for it"


def test_nothing_fits_says_the_smallest_peak_and_what_would_fit(make):
    search = make(fine, by_width, space={"x": "interval(0.0,1.0)", "width": "choice(32,64)"},
                  n_trials=1)  # fmt: skip
    with pytest.raises(SearchError) as caught:
        search.run()
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert "the smallest peak seen is 160.0 MiB" in message or "0.16 GiB" in message
    assert "memory.activation_checkpointing=true" in message
    assert "memory.budget=161MiB" in message
    assert search.runner.trials == []
    assert SweepSummary.load(search.folder).best is None


def weights(params):
    """Predict a peak that each of three settings adds to; 8 MiB at the least."""
    peak = int((params["width"] * params["depth"] + params["batch"]) * MIB)
    return Prediction(peak, peak, (peak, peak), {})


WIDE = {"width": "range(2,200)", "depth": "range(2,100)", "batch": "choice(4,8,16)",
        "lr": "interval(0.0,1.0)"}  # fmt: skip


def test_that_nothing_fits_is_known_after_a_few_dozen_trials(make):
    search = make(fine, weights, space=WIDE, budget_bytes=7 * MIB, n_trials=60)
    with pytest.raises(SearchError, match=r"smallest peak seen is 8\.0 MiB"):
        search.run()
    assert 30 <= len(search.study.trials) < 60
    assert any("exceed the budget" in line and "lightest" in line for line in make.said)
    again = make(fine, weights, space=WIDE, budget_bytes=7 * MIB, storage=search.study._storage)
    with pytest.raises(SearchError, match=r"smallest peak seen is 8\.0 MiB"):
        again.run()
    assert again.jobs.predicted == 0, "the study knows it already"


def test_a_small_corner_that_fits_is_found(make):
    """One point in 20,000 but for `lr`: suggestions alone would take hundreds."""

    def objective(params):
        return TrialOutcome(Outcome.completed, params["lr"], 8 * MIB, 8 * MIB)

    search = make(objective, weights, space=WIDE, budget_bytes=8 * MIB, n_trials=1)
    best = search.run().best
    assert [best["params"][name] for name in ("width", "depth", "batch")] == [2, 2, 4]
    assert len(search.study.trials) < 60


def test_what_ran_out_of_memory_does_not_show_that_something_fits(make):
    def closely(params):
        return replace(weights(params), interval_bytes=(0, None)) if params["width"] < 9 else (
            weights(params)
        )  # fmt: skip

    search = make(lambda params: TrialOutcome(Outcome.out_of_memory), closely, space=WIDE,
                  budget_bytes=7 * MIB, n_trials=50)  # fmt: skip
    with pytest.raises(SearchError):
        search.run()
    assert "out_of_memory" in kinds(search)
    assert len(search.study.trials) < 60


def test_no_point_is_left_waiting_once_all_trials_are_done(make):
    search = make(lambda params: TrialOutcome(Outcome.out_of_memory, excess_bytes=MIB), n_trials=12)
    with pytest.raises(SearchError):
        search.run()
    assert states(search) == [TrialState.PRUNED] * 12


def test_where_something_fitted_a_search_goes_on_longer(make):
    def predict(params):
        return None if params["search.trial"] == 0 else weights(params)

    small = TrialOutcome(Outcome.completed, 1.0, MIB, MIB)
    search = make(lambda params: small, predict, space=WIDE, budget_bytes=7 * MIB, n_trials=2)
    assert search.run().finished == 1
    assert any("100 suggestions in a row were not trained" in line for line in make.said)


def test_all_failed_says_why(make):
    search = make(lambda params: TrialOutcome(Outcome.failed, error="no such file"), n_trials=2)
    with pytest.raises(SearchError, match="2 failed, the last with: no such file"):
        search.run()


def test_after_its_time_a_search_begins_no_trial_and_lets_those_that_run_end(make, clock):
    def slow(params):
        clock.seconds += 40.0
        return fine(params)

    storage = optuna.storages.InMemoryStorage()
    search = make(slow, storage=storage, time_limit_seconds=100.0)
    assert search.run().finished == 3, "the third was begun after 80 seconds"
    assert any("no more trials: search.time_limit_seconds=100" in line for line in make.said)
    assert make(slow, storage=storage).run().finished == 6, "without a limit it goes on to its end"


def test_after_its_time_a_search_leaves_what_a_dead_worker_left(make, clock):
    def slow(params):
        clock.seconds += 60.0
        return fine(params)

    storage = optuna.storages.InMemoryStorage()
    dead = make(fine, storage=storage)
    for _ in range(3):
        dead.study.ask(dict(dead.space.distributions))
    search = make(slow, storage=storage, time_limit_seconds=100.0)
    assert search.run().finished == 2
    assert [trial.state for trial in search.study.trials].count(TrialState.RUNNING) == 1


def test_that_nothing_fits_is_said_where_the_trials_and_not_the_time_ran_out(make, clock):
    def slow(params):
        clock.seconds += 200.0
        return TrialOutcome(Outcome.out_of_memory, excess_bytes=5 * MIB, error="memory ran out")

    search = make(
        slow, by_width, n_trials=1, time_limit_seconds=100.0, space={"width": "choice(8)"}
    )
    with pytest.raises(SearchError, match="nothing fits 100"):
        search.run()


def test_a_search_that_found_nothing_in_its_time_does_not_say_that_nothing_fits(make, clock):
    def over(params):
        clock.seconds += 40.0
        return Prediction(200 * MIB, 200 * MIB, (190 * MIB, 210 * MIB), {})

    search = make(fine, over, time_limit_seconds=100.0)
    with pytest.raises(SearchError, match=r"in search.time_limit_seconds=100; the smallest peak"):
        search.run()
    assert kinds(search) == ["predicted_over"] * 3


def test_settings_that_contradict_each_other_are_not_started(make):
    def predict(params):
        return (
            Prediction(refusal="width 8 and x do not go together") if params["width"] == 8 else None
        )

    search = make(fine, predict, n_trials=3)
    summary = search.run()
    assert summary.refused == kinds(search).count("refused") > 0
    assert summary.finished == 3
    assert len(search.runner.trials) == 3


def test_the_median_prunes_at_the_end_of_an_epoch(make):
    search = make(fine, n_trials=8, pruner=Pruner.median)

    def epochs(params):
        bad = params["search.trial"] >= 6
        return [(epoch, 50.0 if bad else 1.0) for epoch in (1, 2, 3)]

    search.runner.epochs = epochs
    summary = search.run()
    assert kinds(search)[:6] == ["completed"] * 6
    assert kinds(search)[6:] == ["pruned"] * 2
    assert summary.pruned == 2
    assert search.study.trials[7].state is TrialState.PRUNED
    assert search.study.trials[7].intermediate_values == {1: 50.0, 2: 50.0}
    assert [trial.stopped for trial in search.runner.trials[6:]] == ["pruned"] * 2


def test_the_total_holds_over_two_runs_of_a_study(make):
    storage = optuna.storages.InMemoryStorage()
    make(fine, storage=storage, n_trials=3).run()
    search = make(fine, storage=storage, n_trials=5)
    assert search.run().finished == 5
    assert len(search.runner.trials) == 2
    again = make(fine, storage=storage, n_trials=5)
    assert again.run().finished == 5
    assert again.runner.trials == []


def test_the_trials_of_a_dead_worker_are_adopted_with_their_number(make):
    storage = optuna.storages.InMemoryStorage()
    first = make(fine, storage=storage, n_trials=3, seed=1)
    abandoned = first.study.ask(dict(first.space.distributions))
    dead = {**identity(), "pid": 2**22 + 1}
    abandoned.set_user_attr(WORKER, dead)
    abandoned.set_user_attr(STARTED, True)
    abandoned.set_user_attr("attempts", 1)
    search = make(fine, storage=storage, n_trials=3)
    assert search.run().finished == 3
    assert [trial.number for trial in search.study.trials] == [0, 1, 2]
    assert search.study.trials[0].params == abandoned.params
    assert search.study.trials[0].user_attrs["attempts"] == 2


def test_a_trial_whose_worker_was_killed_before_it_signed_is_adopted(make):
    storage = optuna.storages.InMemoryStorage()
    make(fine, storage=storage).study.ask()  # not even its values were drawn
    search = make(fine, storage=storage, n_trials=2)
    assert search.run().finished == 2
    assert states(search) == [TrialState.COMPLETE] * 2


def test_ctrl_c_leaves_what_runs_to_the_next_worker_and_keeps_the_rest(make):
    storage = optuna.storages.InMemoryStorage()
    search = make(fine, storage=storage, n_trials=5)
    start = search.runner.start

    def interrupt_third(job):
        trial = start(job)
        if job.number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return trial

    search.runner.start = interrupt_third
    with pytest.raises(Stopped) as caught:
        search.run()
    assert caught.value.exit_code == 130
    assert search.runner.trials[2].stopped == "signal"
    assert states(search) == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING]
    assert SweepSummary.load(search.folder).finished == 2
    assert make(fine, storage=storage, n_trials=5).run().finished == 5


def test_a_stop_is_no_failure_that_uses_up_a_retry(make):
    storage = optuna.storages.InMemoryStorage()
    search = make(fine, storage=storage, n_trials=1, retry=1)
    start = search.runner.start

    def interrupt(job):
        os.kill(os.getpid(), signal.SIGINT)
        return start(job)

    search.runner.start = interrupt
    with pytest.raises(Stopped):
        search.run()
    results = [TrialOutcome(Outcome.failed, error="x"), TrialOutcome(Outcome.completed, 3.0, 1, 1)]
    again = make(lambda params: results.pop(0), storage=storage, n_trials=1, retry=1)
    assert again.run().finished == 1
    assert again.study.trials[0].user_attrs["attempts"] == 3


def test_a_search_that_lost_its_storage_goes_on_in_the_same_process(make, monkeypatch):
    """Not even that it leaves its trials can be written down then."""
    storage = optuna.storages.InMemoryStorage()
    search = make(fine, storage=storage, n_trials=3)

    def gone(*arguments):
        raise StorageError("gone")

    with monkeypatch.context() as lost:
        lost.setattr(storage, "set_trial_user_attr", gone)
        search.reservations._mine.add(0)
        with pytest.raises(StorageError):
            search.run()
    assert make(fine, storage=storage, n_trials=3).run().finished == 3


def test_a_trial_is_seen_to_while_it_is_predicted(make, monkeypatch):
    """A ladder of a slow model takes minutes, after which another machine would take it over."""
    monkeypatch.setattr("expt.search.loop.BEAT_SECONDS", 0.001)
    beaten = threading.Event()

    def predict(params):
        assert beaten.wait(30)

    search = make(fine, predict, n_trials=1)
    beat = search.reservations.beat

    def noted(trial):
        if threading.current_thread() is not threading.main_thread():
            beaten.set()
        return beat(trial)

    search.reservations.beat = noted
    assert search.run().finished == 1


def test_a_pause_is_no_time_of_the_search(make):
    start = datetime(2026, 1, 1)
    hour = timedelta(hours=1)
    trial = optuna.trial.create_trial(value=1.0)
    trial.datetime_start, trial.datetime_complete = start, start + 10 * hour
    assert wall_seconds([trial]) == 10 * 3600
    trial.user_attrs["resumed_at"] = (start + 9 * hour).timestamp()
    assert wall_seconds([trial]) == 3600


def test_a_storage_that_goes_away_is_one_line(make):
    from sqlalchemy.exc import OperationalError

    search = make(fine, n_trials=3)

    def fail(*arguments):
        raise OperationalError("update", {}, Exception("server closed the connection"))

    search.study.tell = fail
    with pytest.raises(StorageError, match="Start the same command again"):
        search.run()
    assert search.runner.trials[0].killed is False  # it had ended


def test_two_figures_are_minimised(make):
    def objective(params):
        peak = int(params["width"] * MIB)
        return TrialOutcome(Outcome.completed, 10 / params["width"] + params["x"], peak, peak)

    node = {"_target_": "hydra_plugins.hydra_optuna_sweeper._impl.create_nsgaii_sampler",
            "seed": None, "population_size": 4}  # fmt: skip
    search = make(objective, lambda params: None, node, n_trials=12,
                  objectives=["val/mae", "peak_memory"])  # fmt: skip
    summary = search.run()
    assert summary.finished == 12
    front = summary.pareto
    assert len(front) >= 2
    peaks = [row["peak_allocated_bytes"] for row in front]
    errors = [row["val/mae"] for row in front]
    assert peaks == sorted(peaks)
    assert errors == sorted(errors, reverse=True)
    assert summary.best["val/mae"] == min(errors)


def test_without_a_budget_every_finished_trial_counts(make):
    search = make(fine, n_trials=2, budget_bytes=None)
    summary = search.run()
    assert summary.best is not None
    assert search.study.trials[0].constraints == {}


def test_a_sampler_that_sees_no_way_on_gets_a_point_drawn_at_random(make):
    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return {"x": 0.5, "width": 8}[name]

    search = make(fine, n_trials=12)
    search.study.sampler = Stubborn()
    summary = search.run()
    assert summary.finished == 12
    assert 40 <= summary.duplicates <= 60, "every fifth suggestion is another one"


def test_ten_thousand_trials_do_not_slow_a_suggestion_beyond_optunas_own_time(make):
    """Looking for duplicates and counting is added to what Optuna takes for an `ask`."""
    search = make(fine, n_trials=20_000)
    frozen = [
        optuna.trial.create_trial(
            params={"x": index / 10_000, "width": 8},
            distributions=dict(search.space.distributions),
            value=1.0,
            user_attrs={KIND: "completed"},
        )
        for index in range(10_000)
    ]
    search.study.add_trials(frozen)
    search.study.sampler = optuna.samplers.TPESampler(seed=0)
    started = time.thread_time()  # of this thread, or another process would count
    search.study.ask(dict(search.space.distributions))
    optunas = time.thread_time() - started
    search.study.tell(search.study.trials[-1].number, state=TrialState.FAIL)
    started = time.thread_time()
    search.reservations.next()
    ours = time.thread_time() - started
    assert ours < 2 * optunas + 0.25, (ours, optunas)


def test_a_copy_that_waits_is_seen_to_like_a_trial_that_runs(make, monkeypatch):
    """Or a worker on another machine takes it for an orphan, and both tell it."""
    search = make(fine, n_trials=3, n_jobs=2)
    point = {"x": 0.25, "width": 8}
    search.study.enqueue_trial(point)
    search.study.enqueue_trial(point)
    beaten = []
    beat = search.reservations.beat
    search.reservations.beat = lambda trial: (beaten.append(trial.number), beat(trial))
    monkeypatch.setattr("expt.search.loop.BEAT_SECONDS", 0.0)
    search.run()
    assert {0, 1} <= set(beaten)


def test_a_trial_that_is_gone_on_with_tells_no_epoch_twice(make):
    """Optuna would warn the user of it, and here warnings are errors."""
    starts = []

    def objective(params):
        starts.append(params["search.trial"])
        return TrialOutcome(Outcome.failed, error="x") if len(starts) == 1 else fine(params)

    search = make(objective, n_trials=1, retry=1)
    search.runner.epochs = lambda params: [(1, 2.0), (2, 1.5)]
    assert search.run().failed == 0
    assert starts == [0, 0]
    assert search.study.trials[0].intermediate_values == {1: 2.0, 2: 1.5}


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("at", ["beat", "end", "epoch"])
def test_a_worker_that_wakes_leaves_what_was_taken_over_and_goes_on(make, monkeypatch, at, ended):
    """It was stopped for minutes, and another machine's worker has its first trial by now."""
    search = make(fine, n_trials=4, n_jobs=2, pruner=Pruner.median)
    elsewhere = {"host": "far", "pid": 7, "started": "1", "beat": 5}
    storage = search.study._storage
    start = search.runner.start

    def finish():
        storage.set_trial_user_attr(0, KIND, "completed")
        storage.set_trial_state_values(0, TrialState.COMPLETE, [3.0])

    def taken(job):
        trial = start(job)
        if job.number == 0:
            storage.set_trial_user_attr(0, WORKER, elsewhere)
            if ended:
                finish()
            if at != "end":
                trial._epochs = [(epoch, 1.0) for epoch in range(1, 40)]
        elif storage.get_trial(0).state is TrialState.RUNNING and job.number == 3:
            finish()
        return trial

    search.runner.start = taken
    if at == "beat":
        monkeypatch.setattr("expt.search.loop.BEAT_SECONDS", 0.0)
    summary = search.run()
    assert summary.finished == 4
    assert search.study.trials[0].values == [3.0], "what the other worker told stands"
    assert search.study.trials[0].user_attrs[WORKER] == elsewhere, "nor is it taken back"
    assert (
        sum(
            "trial 0: it was ended from elsewhere, or another worker took it over" in line
            for line in make.said
        )
        == 1
    )
    assert search.runner.trials[0].killed == (at != "end")
    assert [t.user_attrs[KIND] for t in search.study.trials[1:]] == ["completed"] * 3


def test_a_trial_that_was_told_elsewhere_is_not_started_once_more(make):
    failed = TrialOutcome(Outcome.failed, error="x")
    search = make(lambda params: failed, n_trials=1, retry=1, budget_bytes=None)
    storage, start = search.study._storage, search.runner.start

    def told(job):
        trial = start(job)
        storage.set_trial_user_attr(0, KIND, "completed")
        storage.set_trial_state_values(0, TrialState.COMPLETE, [3.0])
        return trial

    search.runner.start = told
    assert search.run().finished == 1
    assert len(search.runner.trials) == 1
    assert search.study.trials[0].values == [3.0]


def test_a_trial_that_is_taken_over_while_it_is_predicted_is_not_started(make):
    elsewhere = {"host": "far", "pid": 7, "started": "1", "beat": 5}

    def predict(params):
        if params["search.trial"] == 0:
            search.study._storage.set_trial_user_attr(0, WORKER, elsewhere)
        elif params["search.trial"] == 2:
            search.study._storage.set_trial_user_attr(0, KIND, "completed")
            search.study._storage.set_trial_state_values(0, TrialState.COMPLETE, [3.0])

    search = make(fine, predict, n_trials=3)
    assert search.run().finished == 3
    assert [trial.job.number for trial in search.runner.trials] == [1, 2]


def test_every_trial_is_in_exactly_one_class(make):
    """The counts of sweep.json, with each way to end once."""
    over = Prediction(110 * MIB, 110 * MIB, (99 * MIB, 120 * MIB), {})
    ways = {
        0: TrialOutcome(Outcome.completed, 1.0, MIB, MIB),
        1: TrialOutcome(Outcome.over_budget, 1.0, 150 * MIB, 150 * MIB),
        2: TrialOutcome(Outcome.out_of_memory, excess_bytes=MIB),
        3: TrialOutcome(Outcome.killed, error="killed by SIGKILL, perhaps for lack of host memory"),
        4: TrialOutcome(Outcome.killed, error="killed by SIGSEGV"),
        5: TrialOutcome(Outcome.pruned),
        6: TrialOutcome(Outcome.failed),
        7: TrialOutcome(Outcome.timeout),
        8: TrialOutcome(Outcome.diverged),
        9: TrialOutcome(Outcome.refused),
    }

    def predict(params):
        return over if params["search.trial"] in (3, 4) else None

    search = make(lambda params: ways[int(params["search.trial"])], predict, n_trials=10)
    search.run()
    search.config.n_trials = search.reservations.n_trials = 11
    search.study.enqueue_trial(search.study.trials[0].params)
    search.study.enqueue_trial({"x": 0.123})
    search.study.enqueue_trial({"x": 0.456})
    search.study.enqueue_trial({"x": 0.789})
    ways[13] = ways[0]
    search.jobs._predict = lambda params: {
        11: replace(over, interval_bytes=(105 * MIB, None)), 12: Prediction(refusal="no"),
    }.get(int(params["search.trial"]))  # fmt: skip
    summary = search.run()
    assert kinds(search)[3] == "out_of_memory"
    assert search.study.trials[3].state is TrialState.PRUNED
    assert summary.finished == 11
    assert (summary.failed, summary.pruned, summary.infeasible_measured) == (5, 1, 3)
    complete = kinds(search).count("completed")
    assert summary.finished == 5 + 1 + 3 + complete
    beside = (summary.infeasible_predicted, summary.duplicates, summary.refused)
    assert beside == (1, 1, 1)
    assert summary.finished + sum(beside) == len(search.study.trials)


def test_what_a_stop_kills_is_left_to_the_next_start(make):
    """Over a launcher the same signal reaches the trials, which end at once."""
    search = make(
        lambda params: TrialOutcome(Outcome.killed, error="stopped by a signal"), n_trials=3
    )
    start = search.runner.start

    def interrupt(job):
        trial = start(job)
        trial.looks = 5
        os.kill(os.getpid(), signal.SIGINT)
        return trial

    search.runner.start = interrupt
    with pytest.raises(Stopped):
        search.run()
    assert states(search) == [TrialState.RUNNING]
    assert SweepSummary.load(search.folder).finished == 0
    (trial,) = search.runner.trials
    assert trial.looks == 6, "what has told its end is not asked again: its last seed has no next"


def test_a_point_that_was_ended_by_another_hand_is_not_counted_as_tried(make):
    search = make(fine, n_trials=2, space={"x": "choice(0.1,0.2)", "width": "choice(8)"})
    for x in (0.1, 0.2):
        search.study.enqueue_trial({"x": x, "width": 8})
        ended = search.study.ask(dict(search.space.distributions))
        search.study.tell(ended, state=TrialState.FAIL)
    assert search.run().finished == 2
    assert kinds(search).count("completed") == 2


def test_a_peak_that_is_to_be_minimised_and_was_not_measured_is_a_failure(make):
    def objective(params):
        peak = None if params["search.trial"] == 0 else MIB
        return TrialOutcome(Outcome.completed, 1.0, peak, peak)

    search = make(objective, n_trials=2, objectives=["val/mae", "peak_memory"])
    summary = search.run()
    assert (summary.finished, summary.failed) == (2, 1)
    assert kinds(search) == ["failed", "completed"]


ACCURACY = Metric("accuracy", goal="max", label="accuracy")


def test_a_search_by_what_is_to_be_high_ends_with_the_highest(make):
    search = make(n_trials=6, metric=ACCURACY)
    summary = search.run()
    values = [trial.values[0] for trial in search.study.trials]
    assert summary.best["val/accuracy"] == max(values) > min(values)
    assert sum("* best" in line for line in make.said) == sum(
        value == max(values[: n + 1]) for n, value in enumerate(values)
    )


def test_a_pruner_ends_what_is_low_where_higher_is_better(make):
    search = make(n_trials=8, metric=ACCURACY, pruner=Pruner.median, space={"x": "interval(0,1)"})
    search.runner.epochs = lambda params: [(n, params["x"]) for n in (1, 2, 3)]
    search.run()
    pruned = [t.params["x"] for t in search.study.trials if kind_of(t) is Outcome.pruned]
    kept = [t.params["x"] for t in search.study.trials if kind_of(t) is Outcome.completed]
    assert pruned and max(pruned) < statistics.median(kept)


def test_a_pareto_search_goes_up_in_one_and_down_in_the_other(make):
    def objective(params):
        return TrialOutcome(Outcome.completed, params["x"], int(1000 * params["x"]) + 1, 5)

    search = make(objective, n_trials=5, metric=ACCURACY, objectives=["val", "peak_memory"])
    summary = search.run()
    assert len(summary.pareto) == 5, "each is better in one of the two"
    assert [t.number for t in search.study.best_trials] == [0, 1, 2, 3, 4]
