"""Trials that a plan gives techniques to, so that they fit (`memory.on_overflow=adapt`)."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest

from expt.config.compose import compose_lines
from expt.errors import ConfigError
from expt.job import Metric
from expt.result import Outcome
from expt.run.process import WorkerError, identity
from expt.search.candidates import TrialJobs
from expt.search.predicting import Limit, predict
from expt.search.request import fixed_settings, resolved_settings
from expt.search.space import Space
from expt.search.study import open_study
from expt.search.trial import TECHNIQUES, WORKER, Prediction, TrialOutcome, technique_lines
from expt.search.winner import describe, told_line

SMALL = (
    "search=debug", "memory=minimal", "tracking=none", "data=metr_la_29", "model.embed_dim=8",
    "model.num_heads=2", "model.num_stages=1", "data.batch_size=8", "search.trial=1",
    "memory.gradient_accumulation=1", "memory.activation_checkpointing=false",
)  # fmt: skip
MAE = Metric("mae", unit="mph")
NARROW = {"x": "interval(0.0,1.0)", "width": "choice(8)"}


def peak_of_width(params):
    return Prediction(int(params["width"]), int(params["width"]), (8, 8), {})


def limit(count, *varied):
    return Limit(count, frozenset(varied))


@pytest.fixture(scope="module")
def alone():
    """The prediction of the trial as it is."""
    return predict(list(SMALL), None)


def test_a_point_over_the_budget_is_predicted_with_what_makes_it_fit(home, alone):
    room = int(alone.demand_bytes * 0.8)
    found = predict(list(SMALL), None, home / "known", limit(room))
    assert found.demand_bytes <= room < alone.demand_bytes
    assert found.techniques and not found.recalled
    lines = [f"{name}={str(value).lower()}" for name, value in found.techniques.items()]
    assert all(line.startswith("memory.") for line in lines)
    same = predict([*SMALL, *lines], None)
    assert (same.peak_bytes, same.interval_bytes) == (found.peak_bytes, found.interval_bytes)
    assert not same.techniques
    again = predict([*SMALL, "optimizer.lr=0.02"], None, home / "known", limit(room))
    assert again == replace(found, recalled=True), "every plan on the way was kept"


def test_a_point_that_fits_stays_as_it_is(home, alone):
    found = predict(list(SMALL), None, None, limit(alone.demand_bytes))
    assert found.techniques == {}
    assert found.peak_bytes == alone.peak_bytes


def test_what_the_sampler_varies_stays_as_it_suggested(home, alone):
    room = int(alone.demand_bytes * 0.8)
    found = predict(list(SMALL), None, None, limit(room, "gradient_accumulation"))
    assert found.techniques and "memory.gradient_accumulation" not in found.techniques


def test_where_no_technique_is_enough_the_least_is_told(home, alone):
    found = predict(list(SMALL), None, None, limit(1000))
    assert found.exceeds(1000)
    assert found.demand_bytes < alone.demand_bytes
    assert found.techniques


def test_a_candidate_that_cannot_be_traced_does_not_start_a_point_that_is_over(
    home, alone, monkeypatch
):
    def breaks(*arguments, **settings):
        raise AttributeError("a user's model, on fake tensors")

    monkeypatch.setattr("expt.search.predicting.descend_by_plan", breaks)
    found = predict(list(SMALL), None, None, limit(1000))
    assert found.exceeds(1000)
    assert found.demand_bytes == alone.demand_bytes and found.techniques == {}


def test_techniques_that_take_too_long_leave_the_trial_as_it_is(tmp_path):
    class Slow:
        def call(self, function, lines, own, known, limit, *, seconds):
            if limit is not None:
                raise WorkerError("it took more than 5 s")
            return Prediction(9, 9, (9, 9), {})

    jobs = TrialJobs([], None, tmp_path, 5, worker=Slow(), adapts=True)
    assert jobs.predict(["a=1"]).exceeds(5)


def test_a_kept_plan_alone_leaves_no_point_out(tmp_path):
    class Known:
        def call(self, function, lines, own, known, limit, *, seconds):
            if known is None:
                self.lines = lines
                return Prediction(4, 4, (4, 4), {})
            return Prediction(9, 9, (9, 9), {}, None, None, True, dict(chosen))

    chosen = {"memory.activation_checkpointing": True}
    worker = Known()
    found = TrialJobs([], None, tmp_path, 5, worker=worker, adapts=True).predict(["a=1"])
    assert worker.lines == ["a=1", "memory.activation_checkpointing=true"]
    assert found.techniques == chosen and not found.exceeds(5)


def test_only_a_search_that_asks_for_it_has_its_trials_adapted(tmp_path):
    class Noting:
        def call(self, function, lines, own, known, limit, *, seconds):
            self.limit = limit
            return Prediction(1, 1, (1, 1), {})

    worker = Noting()
    varied = ("memory.activation_checkpointing", "+model.depth", "data.batch_size")
    for adapts, budget, wanted in ((False, 5, None), (True, None, None), (True, 5, 5)):
        given = ["+memory=lite", "memory.forward_chunks=2"]
        jobs = TrialJobs(given, None, tmp_path, budget, worker=worker, varied=varied, adapts=adapts)
        jobs.predict(["a=1"])
        assert (worker.limit and worker.limit.bytes) == wanted
    assert {"activation_checkpointing", "forward_chunks"} <= worker.limit.kept


def lighter(params):
    """A prediction that fits with two parts, and that is made of what was given them already."""
    known = "memory.gradient_accumulation" in params
    return Prediction(
        10, 10, (10, 10), {}, techniques={} if known else {"memory.gradient_accumulation": 2}
    )


def test_a_trial_is_trained_with_what_was_chosen_for_it(make):
    search = make(predict=lighter, n_trials=2)
    search.run()
    for trial in search.study.trials:
        assert trial.user_attrs[TECHNIQUES] == {"memory.gradient_accumulation": 2}
        assert technique_lines(trial) == ["memory.gradient_accumulation=2"]
        assert "memory.gradient_accumulation" not in trial.params
    for started in search.runner.trials:
        assert started.job.lines.count("memory.gradient_accumulation=2") == 1
    first = search.study.trials[0]
    assert told_line(first, False, MAE).endswith("with memory.gradient_accumulation=2")
    assert describe(first, {}, MAE)[TECHNIQUES] == {"memory.gradient_accumulation": 2}


def test_a_trial_that_is_started_again_has_them_once(make):
    def fails_once(params):
        ended.append(params)
        if len(ended) == 1:
            return TrialOutcome(Outcome.failed, error="once")
        return TrialOutcome(Outcome.completed, 1.0, 1000, 1000, seconds=1.0)

    ended = []
    search = make(fails_once, predict=lighter, n_trials=1, retry=1)
    search.run()
    assert len(ended) == 2
    for started in search.runner.trials:
        assert started.job.lines.count("memory.gradient_accumulation=2") == 1


def test_a_trial_that_is_adopted_keeps_them(make):
    storage = optuna.storages.InMemoryStorage()
    first = make(predict=lighter, n_trials=1, storage=storage, space=NARROW)
    assert first._begin() == "begun"
    storage.set_trial_user_attr(
        first.study.trials[0]._trial_id, WORKER, {**identity(), "pid": 2**22 + 1}
    )
    # It fits with them, so that nothing is chosen any more.
    second = make(predict=peak_of_width, n_trials=1, storage=storage, space=NARROW)
    second.run()
    (trial,) = second.study.trials
    assert trial.user_attrs[TECHNIQUES] == {"memory.gradient_accumulation": 2}
    (started,) = second.runner.trials
    assert started.job.lines.count("memory.gradient_accumulation=2") == 1


def composed(*lines):
    return compose_lines(["search=debug", "memory=minimal", *lines], None)


def test_a_study_is_adapted_from_its_start_or_never(home):
    """What was refused in one would be trained in the other."""
    space = Space.parse({"model.dropout": "interval(0.0,0.3)"})
    plain, adapted = (
        fixed_settings(composed("memory.budget=1GiB", f"memory.on_overflow={kind}"), space)
        for kind in ("train", "adapt")
    )
    assert plain == fixed_settings(composed(), space), "a trial is trained in either case"
    assert adapted["memory.on_overflow"] == "adapt"
    device = "cpu"
    assert resolved_settings(composed(), space, device) != resolved_settings(
        composed("memory.on_overflow=adapt", "memory.budget=1GiB"), space, device
    )
    without = fixed_settings(composed("memory.on_overflow=adapt"), space)
    assert without == plain, "nothing is adapted without a budget"

    def opened(storage, setting):
        return open_study(
            "one", storage, optuna.samplers.RandomSampler(), optuna.pruners.NopPruner(), ["val"],
            MAE, {"setting": setting},
        )  # fmt: skip

    for begun, asked in ((plain, adapted), (adapted, plain)):
        storage = optuna.storages.InMemoryStorage()
        opened(storage, begun).ask()
        opened(storage, begun)
        with pytest.raises(ConfigError, match=r"memory\.on_overflow differs"):
            opened(storage, asked)
