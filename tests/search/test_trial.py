from __future__ import annotations

import pytest
from optuna.trial import FrozenTrial, create_trial

from expt.result import Outcome
from expt.search.trial import KIND, PREDICTED, STARTED, Prediction, TrialOutcome, ran_out_before
from expt.units import GIB

OVER = Prediction(12 * GIB, 12 * GIB, (11 * GIB, 13 * GIB))


@pytest.mark.parametrize(
    ("low", "budget", "expected"),
    [(11, 10, True), (11, 11, False), (9, 10, False), (11, None, False)],
)
def test_a_prediction_exceeds_by_more_than_its_interval(low, budget, expected):
    found = Prediction(12 * GIB, 12 * GIB, (low * GIB, None))
    assert found.exceeds(None if budget is None else budget * GIB) is expected


def ended(kind: str, predicted: int, **more: int) -> FrozenTrial:
    """A trial that was started under 10 GiB and ended like this; predicted in GiB."""
    known = {KIND: kind, PREDICTED: predicted * GIB, STARTED: True, "budget_bytes": 10 * GIB}
    return create_trial(value=1.0, user_attrs={**known, **more})


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], False),
        ([ended("out_of_memory", 12)], True),
        ([ended("over_budget", 11, demand_bytes=11 * GIB)], True),
        ([ended("out_of_memory", 13)], False),  # nothing is known of less
        ([ended("out_of_memory", 11), ended("completed", 12, demand_bytes=9 * GIB)], False),
        ([ended("out_of_memory", 11), ended("completed", 11, demand_bytes=9 * GIB)], True),
        ([ended("out_of_memory", 12), ended("diverged", 13, demand_bytes=GIB)], True),
        ([ended("out_of_memory", 12, budget_bytes=9 * GIB)], False),  # it was another budget
        ([ended("predicted_over", 12, **{STARTED: False})], False),
    ],
)
def test_what_ran_out_before_settles_a_doubtful_peak(trials, expected):
    assert ran_out_before(trials, OVER, 10 * GIB) is expected
    assert not ran_out_before(trials, OVER, 12 * GIB), "it is predicted to fit"
    assert not ran_out_before(trials, OVER, None)


def test_what_was_measured_counts_before_what_was_predicted():
    done = TrialOutcome(Outcome.completed, 1.0, 7 * GIB, 8 * GIB)
    assert done.constraint(OVER, 10 * GIB) == -2.0
    assert TrialOutcome(Outcome.failed).constraint(OVER, 10 * GIB) == 2.0
    assert TrialOutcome(Outcome.predicted_over).constraint(OVER, 10 * GIB) == 2.0


def test_running_out_of_memory_is_never_inside_the_budget():
    oom = TrialOutcome(Outcome.out_of_memory, excess_bytes=GIB)
    assert oom.constraint(None, 10 * GIB) == 1.0
    assert oom.constraint(OVER, 10 * GIB) == 2.0
    fits = Prediction(5 * GIB, 5 * GIB, (5 * GIB, 5 * GIB))
    assert oom.constraint(fits, 10 * GIB) == 1.0


def test_no_constraint_is_invented():
    assert TrialOutcome(Outcome.out_of_memory).constraint(None, 10 * GIB) is None
    assert TrialOutcome(Outcome.failed).constraint(None, 10 * GIB) is None
    assert TrialOutcome(Outcome.completed, 1.0, GIB, GIB).constraint(None, None) is None
