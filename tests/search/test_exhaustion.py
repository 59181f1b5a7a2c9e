from __future__ import annotations

from types import MappingProxyType

import optuna
import pytest
from optuna.trial import TrialState

from expt.search.exhaustion import all_tried, lighter_point, nothing_fitted, over_budget
from expt.search.reservation import waiting
from expt.search.space import Space
from expt.search.trial import CONSTRAINT, KIND, PREDICTED, STARTED

SPACE = Space.parse({"width": "range(1,101)", "rate": "interval(0.0,1.0)", "kind": "choice(a,b)"})


@pytest.fixture
def told():
    """Add a trial of a point to a study, with its excess; return all of its trials."""
    study = optuna.create_study()

    def tell(width, excess, rate=0.5, kind="a", attributes=MappingProxyType({})):
        study.enqueue_trial({"width": width, "rate": rate, "kind": kind})
        trial = study.ask(dict(SPACE.distributions))
        trial.set_constraint(CONSTRAINT, excess)
        for name, value in {KIND: "predicted_over", **attributes}.items():
            trial.set_user_attr(name, value)
        study.tell(trial, state=TrialState.PRUNED)
        return study.get_trials()

    return tell


def test_the_lightest_point_is_changed_in_one_setting_until_nothing_is_left(told):
    trials = told(80, 8.0)
    trials = told(40, 4.0)
    found = []
    while point := lighter_point(trials, SPACE):
        found.append(point)
        trials = told(point["width"], point["width"] / 10, point["rate"], point["kind"])
        assert len(found) < 30
    lightest = min(trials, key=lambda trial: trial.constraints[CONSTRAINT])
    assert lightest.params["width"] == 1
    around = [p for p in found if sum(p[n] != lightest.params[n] for n in p) == 1]
    assert {p["width"] for p in around} >= {26, 51, 75, 100}, "five of a hundred values"
    assert {p["rate"] for p in around} >= {0.0, 1.0}, "the ends of an interval"
    assert {p["kind"] for p in around} == {"a", "b"}


def test_the_value_that_was_light_elsewhere_comes_first(told):
    told(30, 9.0, kind="b")
    trials = told(1, 5.0)
    trials = told(20, 0.5, rate=0.1)
    assert lighter_point(trials, SPACE)["width"] == 1, (
        "5 GiB; with b it was 9, else nothing is known"
    )


def test_without_a_figure_there_is_nothing_to_go_by():
    study = optuna.create_study()
    refused = study.ask(dict(SPACE.distributions))
    assert lighter_point(study.get_trials(), SPACE) is None
    refused.set_constraint(CONSTRAINT, -1.0)
    study.tell(refused, state=TrialState.FAIL)
    assert lighter_point(study.get_trials(), SPACE) is None, "it would have fitted"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({KIND: "predicted_over"}, True),
        ({KIND: "refused", STARTED: True}, True),
        ({KIND: "out_of_memory", STARTED: True}, True),
        ({KIND: "over_budget", STARTED: True}, True),
        ({}, True),
        ({STARTED: True}, False),
        ({KIND: "completed", STARTED: True}, False),
        ({KIND: "failed", STARTED: True}, False),
    ],
)
def test_what_shows_that_something_may_fit(attributes, expected):
    study = optuna.create_study()
    trial = study.ask()
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    assert nothing_fitted(study.get_trials()) is expected


def test_a_point_that_waits_and_one_that_was_ended_by_hand():
    space = Space.parse({"kind": "choice(a,b)"})
    study = optuna.create_study()
    for kind in "ab":
        study.enqueue_trial({"kind": kind})
    assert waiting(study.get_trials())
    first, second = (study.ask(dict(space.distributions)) for _ in "ab")
    assert not waiting(study.get_trials())
    assert all_tried(study.get_trials(), space)
    study.tell(first, state=TrialState.FAIL)
    second.set_user_attr(KIND, "failed")
    study.tell(second, state=TrialState.FAIL)
    assert not all_tried(study.get_trials(), space)


def test_what_ran_out_of_memory_tells_its_weight_only_if_it_was_predicted(told):
    told(50, 1.0)
    trials = told(
        90, 0.001, attributes={KIND: "out_of_memory", STARTED: True}
    )  # what the last allocation lacked
    assert [trial.params["width"] for trial in over_budget(trials)] == [50]
    assert lighter_point(trials, SPACE)["width"] != 90
    trials = told(70, 1.5, attributes={KIND: "out_of_memory", STARTED: True, PREDICTED: 1})
    trials = told(60, 1.2, attributes={KIND: "duplicate"})
    assert [trial.params["width"] for trial in over_budget(trials)] == [50, 70]
