from __future__ import annotations

import pytest

from expt.errors import SearchError
from expt.result import Outcome, RunResult
from expt.search.metric import EARLIER
from expt.search.trial import TrialOutcome
from expt.search.winner import TESTED, best_trial, run_test


@pytest.fixture
def searched(make):
    """A search of two trials, and a function that tests its best one."""
    search = make(n_trials=2)
    search.run()
    winner = best_trial(search.study.trials, limited=True, metric=EARLIER)
    folder = search.trial_folder(winner.number)

    def test():
        run_test(search.study, winner, search.reservations, search.runner, ["x=0.5"], folder, [0])

    return search, winner, folder, test


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (TrialOutcome(Outcome.failed, error="no such file"), "failed (no such file)"),
        (
            TrialOutcome(Outcome.out_of_memory, error="memory ran out"),
            "out of memory (memory ran out)",
        ),
        (TrialOutcome(Outcome.timeout), "timeout; its output"),
        (TrialOutcome(Outcome.completed, 1.0), "its run left no test/mae, or one that is not a"),
    ],
)
def test_a_test_that_goes_wrong_says_which_trial_why_and_how_to_go_on(searched, outcome, why):
    search, winner, folder, test = searched
    search.runner.objective = lambda params: outcome
    with pytest.raises(SearchError) as caught:
        test()
    message = str(caught.value)
    assert caught.value.exit_code == 1
    for part in (f"the best trial, {winner.number}, could not", why, str(folder / "output.log"),
                 "The same command again"):  # fmt: skip
        assert part in message
    assert TESTED not in search.study.user_attrs


def test_what_went_wrong_is_tested_again_and_then_never_more(searched):
    search, winner, folder, test = searched
    search.runner.objective = lambda params: TrialOutcome(Outcome.failed)
    with pytest.raises(SearchError):
        test()

    def objective(params):
        result = RunResult("completed", "epochs")
        result.metrics["test/mae"] = 3.5
        result.save(folder)
        return TrialOutcome(Outcome.completed, 1.0)

    search.runner.objective = objective
    test()
    assert search.study.user_attrs[TESTED] == {str(winner.number): {"test/mae": 3.5}}
    started = len(search.runner.trials)
    test()
    assert len(search.runner.trials) == started


@pytest.mark.parametrize("turn", [1, -1])
def test_a_figure_that_one_seed_does_not_have_has_no_mean(searched, turn):
    search, winner, folder, _ = searched
    nan = float("nan")

    def test(first, second):
        def objective(params):
            for seed, figures in zip((0, 1), (first, second)[::turn], strict=True):
                result = RunResult("completed", "epochs")
                result.metrics |= figures
                result.save(folder / f"seed_{seed}")
            return TrialOutcome(Outcome.completed, 1.0)

        search.runner.objective = objective
        run_test(search.study, winner, search.reservations, search.runner, [], folder, [0, 1])

    with pytest.raises(SearchError, match="one of its seeds left no test/mae, or one that is not"):
        test({"test/mae": 3.0, "test/f1": 0.5}, {"test/mae": nan, "test/f1": 0.7})
    test({"test/mae": 3.0, "test/f1": 0.5}, {"test/mae": 4.0, "test/f1": nan})
    figures = search.study.user_attrs[TESTED][str(winner.number)]
    assert figures == {"test/mae": 3.5, "test/mae_spread": pytest.approx(0.5**0.5)}
