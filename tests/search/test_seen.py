from __future__ import annotations

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from expt.result import Outcome
from expt.search.samplers import UNKNOWN_EXCESS, SeenStudy, seen
from expt.search.trial import KIND, TrialOutcome


def trial(kind, x=0.5, value=None, excess=None, state=None, epochs=None):
    states = {"complete": "COMPLETE", "infeasible_measured": "COMPLETE", "oom": "PRUNED",
              "infeasible_predicted": "PRUNED", "pruned": "PRUNED"}  # fmt: skip
    return create_trial(
        state=TrialState[states.get(kind, "FAIL")] if state is None else state,
        params={"x": x},
        distributions={"x": FloatDistribution(0, 1)},
        value=value,
        user_attrs={KIND: kind} if kind else {},
        intermediate_values=epochs,
        constraints=None if excess is None else {"peak_memory": excess},
    )


MINIMIZE = [StudyDirection.MINIMIZE]
TRIALS = [
    trial("complete", value=2.0, excess=-0.5),
    trial("complete", value=4.0, excess=-0.1),
    trial("complete", value=9.0, excess=-0.2),
    trial("infeasible_predicted", excess=0.25),
    trial("oom"),
    trial("crashed", excess=-0.3),
    trial("nan"),
    trial("pruned", excess=-0.1, epochs={1: 7.0, 2: 6.0}),
    trial("infeasible_measured", value=1.0, excess=0.5),
    trial(None, state=TrialState.RUNNING),
    trial(None, state=TrialState.FAIL),
]


@pytest.mark.parametrize(("sampler", "over"), [(GPSampler, 3.0), (NSGAIISampler, 3.0)])
def test_a_sampler_of_complete_trials_sees_what_ended_badly(sampler, over):
    shown = seen(TRIALS, sampler(), MINIMIZE)
    assert [one.values and one.values[0] for one in shown] == [
        2.0, 4.0, 9.0, over, over, 9.0, 9.0, 6.0, 1.0, None, None,
    ]  # fmt: skip
    assert all(one.state is TrialState.COMPLETE for one in shown[:9])
    assert [one.constraints.get("peak_memory") for one in shown] == [
        -0.5, -0.1, -0.2, 0.25, UNKNOWN_EXCESS, -0.3, 0.0, -0.1, 0.5, None, None,
    ]  # fmt: skip
    assert [one.state for one in shown[9:]] == [TrialState.RUNNING, TrialState.FAIL]


def test_a_sampler_that_ranks_by_the_error_alone_sees_what_does_not_fit_as_worst():
    shown = seen(TRIALS, CmaEsSampler(), MINIMIZE)
    assert [one.values[0] for one in shown[:9]] == [
        2.0, 4.0, 9.0, 9.25, 9.0 + UNKNOWN_EXCESS, 9.0, 9.0, 6.0, 9.5,
    ]  # fmt: skip


def test_tpe_sees_a_duplicate_as_what_it_repeats():
    study = optuna.create_study(sampler=TPESampler())
    study.add_trials(TRIALS[:9])
    again = trial("duplicate", state=TrialState.PRUNED)
    again.set_user_attr("duplicate_of", 7)
    study.add_trial(again)
    shown = SeenStudy(study).trials
    assert shown[9].state is TrialState.PRUNED
    assert shown[9].intermediate_values == shown[7].intermediate_values != {}


def test_a_duplicate_of_what_nobody_saw_the_end_of_is_not_shown_as_a_result():
    study = optuna.create_study(sampler=GPSampler())
    ended = trial(None, epochs={1: 0.5}, state=TrialState.FAIL)
    again = trial("duplicate", state=TrialState.FAIL)
    again.set_user_attr("duplicate_of", 9)
    study.add_trials([*TRIALS[:9], ended, again])
    assert [one.state for one in SeenStudy(study).trials[9:]] == [TrialState.FAIL] * 2


@pytest.mark.parametrize("sampler", [GPSampler, CmaEsSampler])
def test_a_duplicate_is_shown_as_what_it_repeats(sampler):
    """Also where its constraint is not known: else it would count as one that fits."""
    study = optuna.create_study(sampler=sampler())
    study.add_trials(TRIALS[:9])
    for number in (4, 7):  # oom, pruned
        first = study.trials[number]
        again = trial("duplicate", excess=first.constraints.get("peak_memory"), state=first.state)
        again.set_user_attr("duplicate_of", number)
        study.add_trial(again)
    shown = SeenStudy(study).trials
    for number, again in ((4, 9), (7, 10)):
        assert shown[again].values == shown[number].values
        assert shown[again].constraints == shown[number].constraints
        assert shown[again].state is TrialState.COMPLETE


def test_a_trial_of_another_hand_does_not_stop_a_search_under_a_budget():
    """GP asks of every complete trial how far it is over, and raises if one does not say."""
    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=1))
    study.add_trials([*TRIALS[:9], trial(None, value=1.0, state=TrialState.COMPLETE)])
    assert SeenStudy(study).trials[9].constraints == {"peak_memory": 0.0}
    SeenStudy(study).ask({"x": FloatDistribution(0, 1)})
    assert study.trials[9].constraints == {}


def test_the_study_itself_keeps_what_was_measured():
    study = optuna.create_study(sampler=GPSampler(seed=0))
    study.add_trials(TRIALS[:9])
    before = [(one.state, one.values, one.constraints) for one in study.trials]
    assert [one.state for one in SeenStudy(study).trials] == [TrialState.COMPLETE] * 9
    assert len(SeenStudy(study).get_trials(states=[TrialState.FAIL])) == 0
    assert [(one.state, one.values, one.constraints) for one in study.trials] == before


def test_tpe_sees_what_failed_and_the_rest_as_it_is():
    shown = seen(TRIALS, TPESampler(), MINIMIZE)
    assert [one.state for one in shown[5:7]] == [TrialState.PRUNED] * 2
    assert all(
        a is b for n, (a, b) in enumerate(zip(shown, TRIALS, strict=True)) if n not in (5, 6)
    )
    assert seen(TRIALS, RandomSampler(), MINIMIZE) == TRIALS


def test_before_anything_was_trained_there_is_nothing_to_be_shown():
    assert seen(TRIALS[3:8], GPSampler(), MINIMIZE) == TRIALS[3:8]


def wasted(sampler, study_of, trials, crash=False):
    """Return how often a sampler suggests what cannot be, where the error falls towards it."""
    study = optuna.create_study(sampler=sampler)
    count = 0
    for _ in range(trials):
        one = study_of(study).ask({name: FloatDistribution(0, 1) for name in "xy"})
        one.study = study
        excess = one.params["x"] - 0.4
        one.set_user_attr(KIND, "complete" if excess <= 0 else "crashed" if crash else "oom")
        if not crash:
            one.set_constraint("peak_memory", excess)
        if excess > 0:
            count += 1
            study.tell(one, state=TrialState.FAIL if crash else TrialState.PRUNED)
        else:
            study.tell(one, 2 - one.params["x"])
    return count


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Constraints have been set")
@pytest.mark.parametrize(
    ("make", "crash", "trials", "seeds"),
    [
        (lambda seed: GPSampler(seed=seed, n_startup_trials=4), False, 12, 1),
        (lambda seed: GPSampler(seed=seed, n_startup_trials=4), True, 20, 1),
        (lambda seed: CmaEsSampler(seed=seed, n_startup_trials=4), False, 60, 4),
        (lambda seed: CmaEsSampler(seed=seed, n_startup_trials=4), True, 60, 4),
        (lambda seed: TPESampler(seed=seed, n_startup_trials=6), True, 40, 1),
    ],
    ids=["gp-over", "gp-crash", "cmaes-over", "cmaes-crash", "tpe-crash"],
)
def test_a_sampler_that_sees_it_suggests_less_of_what_cannot_be(make, crash, trials, seeds):
    blind = sum(wasted(make(n), lambda study: study, trials, crash) for n in range(seeds))
    seeing = sum(wasted(make(n), SeenStudy, trials, crash) for n in range(seeds))
    assert seeing <= 0.75 * blind, (seeing, blind)


def test_a_search_asks_with_open_eyes(make):
    node = {"_target_": "optuna.samplers.TPESampler", "seed": None, "n_startup_trials": 6}
    search = make(lambda params: failing(params["x"]), sampler=node, n_trials=30)
    assert search.run().failed <= 20


def failing(x):
    if x > 0.4:
        return TrialOutcome(Outcome.failed)
    return (
        TrialOutcome(Outcome.failed)
        if x > 0.4
        else TrialOutcome(Outcome.completed, 2 - x, 1000, 1000)
    )


@pytest.mark.parametrize("sampler", [GPSampler, NSGAIISampler, CmaEsSampler])
def test_where_higher_is_better_the_lowest_is_the_worst(sampler):
    maximize = [StudyDirection.MAXIMIZE]
    shown = [one.values[0] for one in seen(TRIALS[:7], sampler(), maximize)]
    assert shown[5:7] == [2.0, 2.0], "what failed is as bad as the worst"
    over = [1.75, 2.0 - UNKNOWN_EXCESS] if sampler is CmaEsSampler else [4.0, 4.0]
    assert shown[3:5] == pytest.approx(over)
