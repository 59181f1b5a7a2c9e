from __future__ import annotations

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from expt.job import Metric
from expt.result import RunResult
from expt.search.metric import ATTRIBUTE, EARLIER
from expt.search.trial import KIND, STARTED
from expt.search.winner import best_trial, describe, figures_of_test, pareto, summarize, told_line

MIB = 1024**2


def trial(value=None, peak=None, excess=None, kind="complete", state=TrialState.COMPLETE, **more):
    return create_trial(
        params={"x": 0.5},
        distributions={"x": FloatDistribution(0, 1)},
        value=value,
        state=state,
        user_attrs={KIND: kind, **({"peak_bytes": peak} if peak else {}), **more},
        constraints=None if excess is None else {"peak_memory": excess},
    )


@pytest.fixture
def study():
    study = optuna.create_study(study_name="mine")
    study.add_trials(
        [
            trial(3.0, 90 * MIB, 0.1, "infeasible_measured", seconds=2.0),
            trial(4.0, 50 * MIB, -0.1, seconds=3.0),
            trial(4.0, 40 * MIB, -0.2, seconds=1.0),
            trial(4.0, 40 * MIB, -0.2, "duplicate", duplicate_of=2),
            trial(6.0, 20 * MIB, -0.3),
            trial(7.0, 30 * MIB, -0.3),
            trial(state=TrialState.PRUNED, kind="oom", excess=0.5),
            trial(state=TrialState.PRUNED, kind="pruned", excess=-0.2),
            trial(state=TrialState.PRUNED, kind="infeasible_predicted", excess=2.0),
            trial(state=TrialState.FAIL, kind="crashed"),
            trial(state=TrialState.FAIL, kind="refused"),
            trial(state=TrialState.FAIL, kind="refused", **{STARTED: True}),
            trial(2.0, None, None),
        ]
    )
    return study


def test_the_best_is_inside_the_budget_and_known_to_be(study):
    assert best_trial(study.trials, limited=True, metric=EARLIER).number == 1
    assert best_trial(study.trials, limited=False, metric=EARLIER).number == 12
    assert best_trial([], limited=True, metric=EARLIER) is None


def test_the_front_has_no_trial_that_another_beats(study):
    assert [t.number for t in pareto(study.trials, limited=True, metric=EARLIER)] == [4, 2]


def test_the_counts_are_those_of_the_issue(study):
    found = summarize(study, 20, 80 * MIB, "here")
    assert (found.finished, found.failed, found.pruned, found.infeasible_measured) == (10, 2, 1, 2)
    assert (found.infeasible_predicted, found.duplicates, found.refused) == (1, 1, 1)
    assert found.training_seconds == 6.0
    assert found.best["trial"] == 1
    assert set(found.best) >= {"trial", "params", "val/mae", "peak_allocated_bytes", "run_id"}


def test_a_study_without_a_feasible_trial_has_no_best():
    study = optuna.create_study()
    study.add_trial(trial(3.0, 90 * MIB, 0.1))
    assert summarize(study, 20, 80 * MIB, "here").best is None


def test_test_figures_are_those_of_the_run(tmp_path):
    result = RunResult("completed", "epochs")
    result.save(tmp_path)
    assert figures_of_test(tmp_path) == {}
    result.metrics["test/mae"] = 3.5
    result.save(tmp_path)
    assert figures_of_test(tmp_path) == {"test/mae": 3.5}
    assert describe(trial(1.0), {"-1": {"test/mae": 3.5}}, EARLIER)["test/mae"] == 3.5


@pytest.mark.parametrize(
    ("one", "line"),
    [
        (trial(3.25, 5 * MIB, seconds=2.0), "val MAE 3.250, peak 5.0 MiB, 2.0 s  * best"),
        (trial(3.0, 5 * MIB, kind="infeasible_measured"), "above the budget"),
        (
            trial(
                state=TrialState.PRUNED, kind="infeasible_predicted",
                predicted_peak_bytes=7 * MIB, budget_bytes=5 * MIB,
            ),
            "not started, predicted peak 7.0 MiB of 5.0 MiB",
        ),
        (trial(3.0, kind="duplicate", duplicate_of=4), "the same as trial 4"),
        (trial(state=TrialState.FAIL, kind="crashed", error="no file"), "failed (no file)"),
    ],
)  # fmt: skip
def test_a_trial_is_told_in_a_line(one, line):
    assert line in told_line(one, is_best=True, metric=EARLIER)


def test_where_higher_is_better_the_highest_wins():
    accuracy = Metric("accuracy", goal="max", label="accuracy")
    study = optuna.create_study(direction="maximize")
    study.set_user_attr(ATTRIBUTE, accuracy.as_dict())
    study.add_trials(
        [
            trial(0.5, 20 * MIB, -0.3),
            trial(0.875, 50 * MIB, -0.1),
            trial(0.25, 30 * MIB, -0.2),
            trial(0.9, 90 * MIB, 0.1, "over_budget"),
        ]
    )
    found = summarize(study, 4, 80 * MIB, "here")
    assert (found.best["trial"], found.best["val/accuracy"]) == (1, 0.875)
    assert [one["trial"] for one in found.pareto] == [0, 1]
    assert (found.compared_by, found.best_value) == (accuracy, 0.875)
    line = told_line(study.trials[1], False, accuracy)
    assert line.startswith("trial 1: val accuracy 0.875, peak 50.0 MiB")


def test_seconds_are_by_the_clock_however_many_trials_were_at_once() -> None:
    from datetime import datetime, timedelta

    from expt.search.winner import wall_seconds

    noon = datetime(2026, 1, 1, 12)

    def trial(start: float, end: float):
        return optuna.trial.create_trial(value=1.0).__class__(
            number=0, state=optuna.trial.TrialState.COMPLETE, value=1.0, params={},
            distributions={}, user_attrs={}, system_attrs={}, intermediate_values={}, trial_id=0,
            datetime_start=noon + timedelta(seconds=start),
            datetime_complete=noon + timedelta(seconds=end),
        )  # fmt: skip

    # Two at once for 10 s, a pause, and one more for 5 s.
    assert wall_seconds([trial(0, 10), trial(2, 9), trial(60, 65)]) == 15.0
    assert wall_seconds([]) == 0.0
