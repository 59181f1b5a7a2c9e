"""`search.retrain`: which points are trained again, and with what."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from hydra.errors import HydraException
from optuna.trial import TrialState

from expt.config.search_node import PEAK, VALIDATION, SearchConfig
from expt.errors import ConfigError, UserError
from expt.result import Outcome
from expt.search import retraining as module
from expt.search.opening import put_points
from expt.search.request import Request
from expt.search.retraining import lines_of, of_retraining, points_to_retrain
from expt.search.space import Space
from expt.search.trial import PRESET, Prediction, TrialOutcome
from expt.search.warm_start import put_first
from expt.search.winner import best_trial


def test_a_retraining_has_its_own_settings_and_none_that_are_about_short_trials():
    given = [
        "trainer.epochs=30", "data.path='a (new) file.csv'", "model.patch_sizes=[1,2]",
        "experiment=accuracy", "search.repeats=3", "~model.extra", "trainer.seed=${model.x}",
    ]  # fmt: skip
    node = SearchConfig(
        study="mine", retrain=3, warm_start="old", trial_time_limit_seconds=60.0, retrain_with=given
    )
    assert lines_of(node) == [
        *given, "search.study=mine_retrained", "search.pruner=none",
        "search.time_limit_seconds=null", "search.trial_time_limit_seconds=null",
        "search.enqueue=[]", "search.warm_start=null", "search.retrain=0", "search.retrain_with=[]",
    ]  # fmt: skip
    node.retrain_with = ["search.study=other", "search.trial_time_limit_seconds=600", "memory=lite"]
    assert {"search.study=other", "search.trial_time_limit_seconds=600", "+memory=lite"} <= set(
        lines_of(node)
    )
    assert "search.study=mine_retrained" not in lines_of(node)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search.presets=[full]", "search.presets is the search's to set"),
        ("search.space={}", "search.space is the search's to set"),
        ("search.n_trials=9", "search.n_trials is the search's to set"),
        ("tracking.uri=null", "tracking.uri is the search's to set"),
        ("task=plan", "task is the search's to set"),
        ("hydra.sweep.dir=x", "Hydra's own"),
        ("hydra/launcher=ray", "Hydra's own"),
        ("model.width=choice(8,16)", "has several values"),
        ("model.width=8,16", "has several values"),
        ("trainer.epochs", "is no setting; write it as on the command line"),
    ],
)
def test_what_a_retraining_may_not_set_is_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        lines_of(SearchConfig(retrain=1, retrain_with=[line]))


def test_a_retraining_of_nothing_new_is_refused():
    (problem,) = SearchConfig(retrain=2).problems()
    assert "search.retrain_with=['trainer.epochs=30']" in problem
    (problem,) = SearchConfig(retrain=-1).problems()
    assert problem == "search.retrain must be at least 0, got -1"


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(ConfigError(["no"]), ConfigError), (HydraException("no"), ConfigError),
     (UserError("no"), UserError), (ValueError("no"), ConfigError)],
)  # fmt: skip
def test_what_goes_wrong_in_a_retraining_says_so(raised, kind):
    with pytest.raises(kind) as refused, of_retraining():
        raise raised
    assert str(refused.value) == "search.retrain_with: no"
    with pytest.raises(KeyboardInterrupt), of_retraining():
        raise KeyboardInterrupt


def outcome(params):
    """Small x is best, and what is widest is over the budget when it is measured."""
    kind = Outcome.over_budget if params["width"] == 32 else Outcome.completed
    peak = int(params["width"]) * 1000 if kind is Outcome.completed else 10**9
    return TrialOutcome(kind, params["x"] + 1, peak, peak, seconds=1.0)


def outcome_of_x(params):
    return TrialOutcome(Outcome.completed, params["x"], 1, 1)


def test_the_best_inside_the_budget_are_trained_again_the_best_first(make):
    search = make(outcome, n_trials=20)
    search.run()
    trials = search.study.get_trials(deepcopy=False)
    inside = sorted(t.params["x"] for t in trials if t.params["width"] != 32)
    assert len(inside) < len(trials), "some are outside, or the test says nothing"
    found, presets = points_to_retrain(search.study, True, 3, search.space)
    assert [point["x"] for point in found] == inside[:3]
    assert found[0] == best_trial(trials, True, search.metric).params
    assert presets == []
    assert len(points_to_retrain(search.study, True, 99, search.space)[0]) == len(inside)


def test_of_a_search_for_a_front_it_is_the_front_that_is_trained_again(make):
    search = make(outcome, n_trials=20, objectives=[VALIDATION, PEAK])
    search.run()
    found, _ = points_to_retrain(search.study, True, 9, search.space)
    assert 1 <= len(found) <= 2, "one for each width inside the budget, or one beats the other"
    assert [p["x"] for p in found] == sorted(p["x"] for p in found)
    assert [p["width"] for p in found] == sorted((p["width"] for p in found), reverse=True)


def test_points_that_differ_in_what_is_set_alone_are_one_and_the_next_takes_the_place(make):
    search = make(outcome, n_trials=4)
    for x, width in ((0.1, 8), (0.2, 8), (0.3, 16), (0.4, 16)):
        search.study.enqueue_trial({"x": x, "width": width})
    search.run()
    widths = Space.parse({"width": "choice(8,16,32)"})
    assert points_to_retrain(search.study, True, 2, widths) == ([{"width": 8}, {"width": 16}], [])
    assert points_to_retrain(search.study, True, 1, widths) == ([{"width": 8}], [])


def test_presets_that_fitted_are_trained_again_as_they_were_completed(make):
    """A preset may give some of the settings only; what was drawn for it counts as its own."""
    search = make(outcome, n_trials=3)
    for point in ({"width": 8}, {"width": 32}):
        put_first(search.study, point, **{PRESET: True})
    search.study.enqueue_trial({"x": 0.0, "width": 16})
    search.run()
    best, presets = points_to_retrain(search.study, True, 1, search.space)
    assert best == [{"x": 0.0, "width": 16}]
    assert presets == [search.study.trials[0].params], "that of width 32 is over the budget"
    best, presets = points_to_retrain(search.study, True, 2, search.space)
    assert (len(best), presets) == (2, []), "it is among the best already"


def test_a_preset_that_was_ended_early_fits_and_is_trained_again(make):
    def ended(params):
        kinds = {0.25: Outcome.timeout, 0.5: Outcome.failed, 0.75: Outcome.out_of_memory}
        return TrialOutcome(kinds.get(params["x"], Outcome.completed), params["x"] + 1, 1, 1)

    search = make(ended, n_trials=4)
    for x in (0.25, 0.5, 0.75, 0.125):
        put_first(search.study, {"x": x, "width": 8}, **({PRESET: True} if x > 0.2 else {}))
    search.run()
    best, presets = points_to_retrain(search.study, True, 3, search.space)
    assert [[point["x"] for point in points] for points in (best, presets)] == [[0.125], [0.25]]


def test_a_preset_that_waits_to_be_tried_already_is_known_for_one(make):
    search = make(outcome)
    search.study.enqueue_trial({"x": 0.5})
    put_first(search.study, {"x": 0.5}, **{PRESET: True})
    (trial,) = search.study.trials
    assert trial.user_attrs == {PRESET: True}


@pytest.mark.parametrize("fits", [True, False])
def test_a_retraining_tries_what_it_was_given_and_suggests_nothing(make, fits):
    def tried(params):
        return TrialOutcome(Outcome.completed, params["x"] + 1, 1, 1)

    def predict(params):
        peak = 1 if fits else 10**9
        return Prediction(peak, peak, (peak, peak), {})

    search = make(tried, predict, n_trials=99)
    search.reservations.given_only = True
    points = [{"x": number / 64, "width": 8} for number in range(40)]
    for point in points:
        search.study.enqueue_trial(point)
    if fits:
        search.run()
    else:
        with pytest.raises(Exception, match="nothing fits"):
            search.run()
    trials = search.study.get_trials(deepcopy=False)
    assert [t.params for t in trials] == points
    assert {t.state for t in trials} == {TrialState.COMPLETE if fits else TrialState.PRUNED}


def test_a_second_start_trains_what_is_new_among_the_points(make):
    storage = optuna.storages.InMemoryStorage()
    points = [{"x": number / 8, "width": 8} for number in range(4)]
    for count in (2, 4):
        search = make(outcome, storage=storage)
        search.reservations.given_only = True
        put_points(search.reservations, points[:count])
        search.config.n_trials = search.reservations.n_trials
        summary = search.run()
        assert (summary.finished, summary.n_trials) == (count, count)
    assert [t.params for t in search.study.trials] == points


@pytest.mark.parametrize("x", ["interval(0.0,1.0)", "choice(0.0,0.125,0.25,0.375)"])
def test_a_second_start_trains_again_what_failed_and_may_not_the_next_time(make, x):
    storage, broken = optuna.storages.InMemoryStorage(), True

    def trained(params):
        ends = {0.0: Outcome.killed, 0.125: Outcome.out_of_memory, 0.25: Outcome.diverged}
        if broken and params["x"] in ends:
            return TrialOutcome(ends[params["x"]], error="by the system")
        return outcome(params)

    points = [{"x": number / 8, "width": 8} for number in range(4)]
    left = []
    for _ in range(3):
        search = make(trained, storage=storage, space={"x": x, "width": "choice(8)"})
        search.reservations.given_only = True
        left.append(put_points(search.reservations, points))
        search.config.n_trials = search.reservations.n_trials
        summary = search.run()
        broken = False
    assert left == [4, 1, 0]
    assert [t.params["x"] for t in search.study.trials] == [0.0, 0.125, 0.25, 0.375, 0.0]
    assert summary.best["params"] == points[0]


def test_a_value_is_not_taken_for_a_string_that_is_written_alike(make):
    space = {"x": "interval(0.0,1.0)", "model.norm": "choice(null,'null')"}
    search = make(outcome_of_x, space=space, n_trials=1)
    search.study.enqueue_trial({"x": 0.5, "model.norm": "null"})
    search.run()
    assert points_to_retrain(search.study, True, 1, search.space)[0] == [
        search.study.trials[0].params
    ]


def test_an_orphan_of_a_retraining_is_gone_on_with(make, tmp_path):
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/s.db")
    search = make(outcome, storage=storage, n_trials=1)
    search.study.enqueue_trial({"x": 0.5, "width": 8})
    search.study.ask()  # by a worker that died at once
    search.reservations.given_only = True
    assert search.run().finished == 1


@pytest.fixture
def retraining(monkeypatch):
    """Return the lines that a retraining composes, and its study and folder."""

    def retraining(arguments, *lines):
        def composed(config, given, sampler, context):
            study = next(line for line in given if line.startswith("search.study="))
            return Request(SearchConfig(study=study[13:]), None, given, {}, None, None, {})

        monkeypatch.setattr(module, "request_of", composed)
        node = SearchConfig(study="mine", retrain=1, retrain_with=list(lines))
        request = Request(node, None, arguments, {}, None, Path("/there/mine"), {})
        found = module.retraining_of(request, None, arguments, None)
        return found.given, found.config.study, found.folder

    return retraining


def test_a_retraining_takes_settings_of_its_search_back(retraining):
    given = ["+memory=lite", "experiment=x", "trainer.epochs=3", "model.width=8"]
    lines, study, folder = retraining(given, "experiment=null", "memory=full", "trainer.epochs=9")
    assert lines[:3] == ["model.width=8", "+memory=full", "trainer.epochs=9"]
    assert (study, folder) == ("mine_retrained", Path("/there/mine/mine_retrained"))


@pytest.mark.parametrize("name", ["mine", "trial_000", "aside_trial_000_1", "plots", "predictions"])
def test_a_retraining_has_a_name_and_a_folder_of_its_own(retraining, name):
    with pytest.raises(ConfigError, match=rf"^search\.study={name}"):
        retraining([], "trainer.epochs=9", f"search.study={name}")
