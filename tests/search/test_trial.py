from __future__ import annotations

import pytest

from expt.result import Outcome
from expt.search.trial import Prediction, TrialOutcome
from expt.units import GIB

OVER = Prediction(12 * GIB, 12 * GIB, (11 * GIB, 13 * GIB))


@pytest.mark.parametrize(
    ("low", "budget", "expected"),
    [(11, 10, True), (11, 11, False), (9, 10, False), (11, None, False)],
)
def test_a_prediction_exceeds_by_more_than_its_interval(low, budget, expected):
    found = Prediction(12 * GIB, 12 * GIB, (low * GIB, None))
    assert found.exceeds(None if budget is None else budget * GIB) is expected


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
