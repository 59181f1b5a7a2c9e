from __future__ import annotations

import optuna
import pytest

from expt.result import Outcome
from expt.search.trial import CONSTRAINT, KIND, Prediction, TrialOutcome, tell_study
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


def test_what_a_killed_worker_was_about_to_tell_does_not_stay(tmp_path, monkeypatch):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})

    def tell(outcome):
        tell_study(study, trial, outcome, OVER, 10 * GIB, ["val/mae"], tmp_path)

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "tell", die)
        with pytest.raises(KeyboardInterrupt):
            tell(TrialOutcome(Outcome.failed, error="no such file", extra={"oom_events": 3}))
    assert study.trials[0].constraints == {CONSTRAINT: 2.0}
    tell(TrialOutcome(Outcome.completed, 1.0, 7 * GIB, 8 * GIB))
    (told,) = study.trials
    assert told.constraints == {CONSTRAINT: -2.0}
    assert (told.user_attrs[KIND], told.user_attrs["error"]) == ("completed", None)
    assert told.user_attrs["oom_events"] is None
