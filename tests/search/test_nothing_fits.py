from __future__ import annotations

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from expt.search.exhaustion import Nearest, nothing_found
from expt.search.space import Space
from expt.search.trial import KIND, Prediction

MIB = 1024**2
SPACE = Space.parse({"width": "range(1,100)"})


class Adviser:
    budget_bytes = 10 * MIB

    def __init__(self, advice=None):
        self.advice, self.asked = advice, []

    def advise(self, lines):
        self.asked.append(list(lines))
        return self.advice


def study_with(*trials):
    study = optuna.create_study(study_name="mine")
    for width, kind, attributes in trials:
        study.add_trial(
            create_trial(
                params={"width": width},
                distributions={"width": IntDistribution(1, 99)},
                state=TrialState.PRUNED,
                user_attrs={KIND: kind, **attributes},
            )
        )
    return study


def test_the_smallest_peak_its_point_and_what_would_fit():
    study = study_with(
        (40, "predicted_over", {"predicted_peak_bytes": 40 * MIB}),
        (20, "predicted_over", {"predicted_peak_bytes": 20 * MIB}),
        (30, "out_of_memory", {"predicted_peak_bytes": 30 * MIB}),
    )
    nearest = Nearest()
    trial = study.ask({"width": IntDistribution(1, 99)})
    nearest.note(trial, ["width=9"], Prediction(50 * MIB, 50 * MIB))
    nearest.number = 1  # the smallest one is this worker's
    nearest.lines = ["width=20"]
    adviser = Adviser("memory.precision=bf16 (9.0 MiB)")
    message = str(nothing_found(study, nearest, adviser, SPACE))
    assert "nothing fits 10.0 MiB" in message
    assert "smallest peak seen is 20.0 MiB, with width=20" in message
    assert "What would fit: memory.precision=bf16 (9.0 MiB), or memory.budget=21MiB" in message
    assert adviser.asked == [["width=20"]]


def test_without_advice_it_is_the_budget_that_would_have_to_change():
    study = study_with((20, "predicted_over", {"predicted_peak_bytes": 20 * MIB}))
    message = str(nothing_found(study, Nearest(), Adviser(), SPACE))
    assert message.endswith("What would fit: memory.budget=21MiB")


def test_without_any_figure_it_does_not_invent_one():
    study = study_with((20, "out_of_memory", {}))
    message = str(nothing_found(study, Nearest(), Adviser(), SPACE))
    assert message == (
        "nothing fits 10.0 MiB (memory.budget); raise the budget, or widen search.space"
    )


def test_what_failed_for_other_reasons_is_told_as_that():
    study = study_with(
        (20, "failed", {"error": "no file"}), (30, "diverged", {"error": "diverged"})
    )
    message = str(nothing_found(study, Nearest(), Adviser(), SPACE))
    assert "2 failed, the last with: no file; diverged" in message


def test_a_prediction_that_was_wrong_is_not_advised():
    """It ran out of memory although 9 MiB were predicted of 10."""
    study = study_with((20, "out_of_memory", {"predicted_peak_bytes": 9 * MIB}))
    message = str(nothing_found(study, Nearest(9 * MIB, ["width=20"], 0), Adviser(), SPACE))
    assert "9" not in message
    assert "raise the budget" in message


def test_what_was_missing_is_added_to_the_budget():
    study = study_with((20, "out_of_memory", {"predicted_peak_bytes": 9 * MIB}))
    trial = study.ask({"width": IntDistribution(1, 99)})
    trial.set_user_attr(KIND, "out_of_memory")
    trial.set_constraint("peak_memory", 4 / 1024)
    study.tell(trial, state=TrialState.PRUNED)
    message = str(nothing_found(study, Nearest(), Adviser(), SPACE))
    assert "smallest peak seen is 14.0 MiB" in message
    assert message.endswith("memory.budget=15MiB")


def test_without_a_budget_none_is_advised():
    class Unlimited(Adviser):
        budget_bytes = None

    message = str(
        nothing_found(study_with((20, "out_of_memory", {})), Nearest(), Unlimited(), SPACE)
    )
    assert "memory ran out in 1 of them" in message
    assert "memory.budget" not in message
