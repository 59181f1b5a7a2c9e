"""`search.retrain`: which points are trained again, and with what."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from expt.config.search_node import PEAK, VALIDATION, SearchConfig
from expt.errors import ConfigError
from expt.result import Outcome
from expt.search.retraining import lines_of, points_to_retrain
from expt.search.trial import TrialOutcome
from expt.search.winner import best_trial


def test_a_retraining_has_its_own_settings_and_none_that_are_about_short_trials():
    node = SearchConfig(
        study="mine", retrain=3, warm_start="old", trial_time_limit_seconds=60.0,
        retrain_with={"trainer.epochs": 30, "trainer.steps_per_epoch": None,
                      "data.path": "a (new) file.csv", "model.patch_sizes": [1, 2],
                      "experiment": "accuracy", "search.repeats": 3},
    )  # fmt: skip
    assert lines_of(node) == [
        "trainer.epochs=30", "trainer.steps_per_epoch=null", 'data.path="a (new) file.csv"',
        "model.patch_sizes=[1,2]", "experiment=accuracy", "search.repeats=3",
        "search.study=mine_retrained", "search.pruner=none",
        "search.trial_time_limit_seconds=null", "search.enqueue=[]", "search.warm_start=null",
        "search.retrain=0", "search.retrain_with=null",
    ]  # fmt: skip
    node.retrain_with = {"search.study": "other", "search.trial_time_limit_seconds": 600}
    assert {"search.study=other", "search.trial_time_limit_seconds=600"} <= set(lines_of(node))
    assert "search.study=mine_retrained" not in lines_of(node)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("search.space", {}, "search.space is the search's to set"),
        ("search.n_trials", 9, "search.n_trials is the search's to set"),
        ("tracking.uri", None, "tracking.uri is the search's to set"),
        ("task", "plan", "task is the search's to set"),
        ("hydra.sweep.dir", "x", "Hydra's own"),
        ("hydra/launcher", "ray", "Hydra's own"),
        ("model.width", "choice(8,16)", "has several values"),
        ("model.width", "8,16", "has several values"),
    ],
)
def test_what_a_retraining_may_not_set_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        lines_of(SearchConfig(retrain=1, retrain_with={name: value}))


def test_a_retraining_of_nothing_new_is_refused():
    (problem,) = SearchConfig(retrain=2).problems()
    assert "'search.retrain_with={trainer.epochs: 30}'" in problem
    (problem,) = SearchConfig(retrain_with=["trainer.epochs=30"]).problems()
    assert "must map settings to values" in problem
    (problem,) = SearchConfig(retrain=-1).problems()
    assert problem == "search.retrain must be at least 0, got -1"


def outcome(params):
    """Small x is best, and what is widest is over the budget when it is measured."""
    kind = Outcome.over_budget if params["width"] == 32 else Outcome.completed
    peak = int(params["width"]) * 1000 if kind is Outcome.completed else 10**9
    return TrialOutcome(kind, params["x"] + 1, peak, peak, seconds=1.0)


def test_the_best_inside_the_budget_are_trained_again_the_best_first(make):
    search = make(outcome, n_trials=20)
    search.run()
    trials = search.study.get_trials(deepcopy=False)
    inside = sorted(t.params["x"] for t in trials if t.params["width"] != 32)
    assert len(inside) < len(trials), "some are outside, or the test says nothing"
    found = points_to_retrain(search.study, limited=True, count=3)
    assert [point["x"] for point in found] == inside[:3]
    assert found[0] == best_trial(trials, True, search.metric).params
    assert len(points_to_retrain(search.study, limited=True, count=99)) == len(inside)


def test_of_a_search_for_a_front_it_is_the_front_that_is_trained_again(make):
    search = make(outcome, n_trials=20, objectives=[VALIDATION, PEAK])
    search.run()
    found = points_to_retrain(search.study, limited=True, count=9)
    assert 1 <= len(found) <= 2, "one for each width inside the budget, or one beats the other"
    assert [p["x"] for p in found] == sorted(p["x"] for p in found)
    assert [p["width"] for p in found] == sorted((p["width"] for p in found), reverse=True)


@pytest.mark.parametrize("fits", [True, False])
def test_a_retraining_tries_what_it_was_given_and_suggests_nothing(make, fits):
    def over(params):
        return TrialOutcome(Outcome.completed if fits else Outcome.over_budget, params["x"] + 1,
                            1 if fits else 10**9, 1 if fits else 10**9)  # fmt: skip

    search = make(over, n_trials=12)
    search.reservations.given_only = True
    points = [{"x": number / 16, "width": 8} for number in range(12)]
    for point in points:
        search.study.enqueue_trial(point)
    if fits:
        search.run()
    else:
        with pytest.raises(Exception, match="nothing fits"):
            search.run()
    trials = search.study.get_trials(deepcopy=False)
    assert [t.params for t in trials] == points
    assert all(t.state is TrialState.COMPLETE for t in trials)


def test_one_that_does_not_fit_is_not_made_up_for(make):
    from .conftest import peak_of_width

    search = make(outcome, peak_of_width, n_trials=2)
    search.reservations.given_only = True
    for width in (16, 8):  # 160 and 80 MiB of 100
        search.study.enqueue_trial({"x": 0.5, "width": width})
    summary = search.run()
    assert (summary.finished, summary.infeasible_predicted) == (1, 1)
    assert len(search.study.get_trials(deepcopy=False)) == 2


def test_an_orphan_of_a_retraining_is_gone_on_with(make, tmp_path):
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/s.db")
    search = make(outcome, storage=storage, n_trials=1)
    search.study.enqueue_trial({"x": 0.5, "width": 8})
    search.study.ask()  # by a worker that died at once
    search.reservations.given_only = True
    assert search.run().finished == 1
