"""What an earlier study leaves to a new one."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from expt.errors import ConfigError
from expt.job import Metric
from expt.result import Outcome, RunResult
from expt.search.metric import ATTRIBUTE
from expt.search.samplers import seen
from expt.search.space import Space
from expt.search.trial import CONSTRAINT, FROM, KIND
from expt.search.warm_start import Task, begin_warm, look_back, open_earlier
from expt.search.winner import SweepSummary, best_trial, summarize
from expt.units import GIB, MIB

MAE = Metric("mae")
SPACE = Space.parse({"model.width": "choice(8,16,32)", "optimizer.lr": "interval(0.0,1.0)"})
FIXED = {"trainer.epochs": 4, "model.depth": 2}
TASK = Task("new", SPACE, FIXED, MAE, ["val/mae"], budget_bytes=100 * MIB)


def trial(width, lr, kind, peak_mib, value=None, **more):
    """A finished trial of a study whose budget was 200 MiB."""
    state = TrialState[kind.columns.trial_state]
    attributes = {KIND: kind.value, "budget_bytes": 200 * MIB}
    if kind is not Outcome.predicted_over and kind is not Outcome.out_of_memory:
        attributes |= {"demand_bytes": peak_mib * MIB, "peak_bytes": peak_mib * MIB}
    return create_trial(
        state=state,
        value=value,
        params={"model.width": width, "optimizer.lr": lr},
        distributions=dict(SPACE.distributions),
        user_attrs=attributes | more,
        constraints={CONSTRAINT: (peak_mib - 200) * MIB / GIB},
    )


@pytest.fixture
def storage():
    return optuna.storages.InMemoryStorage()


def study_of(storage, *trials, name="old", metric=MAE, setting=FIXED):
    study = optuna.create_study(study_name=name, storage=storage, direction=metric.direction)
    study.set_user_attr(ATTRIBUTE, metric.as_dict())
    study.set_user_attr("expt.setting", dict(setting))
    for one in trials:
        study.add_trial(one)
    return study


TRIALS = (
    trial(8, 0.1, Outcome.completed, 50, 3.0),
    trial(16, 0.2, Outcome.completed, 90, 2.0),
    trial(32, 0.3, Outcome.completed, 150, 1.0),  # inside 200 MiB, not inside 100 MiB
    trial(32, 0.4, Outcome.predicted_over, 300),
    trial(32, 0.5, Outcome.failed, 60),
    trial(8, 0.6, Outcome.pruned, 60),
)


def test_what_fits_is_judged_by_the_new_budget(storage):
    found = look_back(study_of(storage, *TRIALS), TASK)
    assert [one.state.name for one in found.shown] == [
        "COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "PRUNED",
    ]  # fmt: skip
    excess = [round(one.constraints[CONSTRAINT] * 1024) for one in found.shown]
    assert excess == [-50, -10, 50, 200, -40]
    assert found.first == [{"model.width": 16, "optimizer.lr": 0.2}], "the best that fits now"
    assert found.left_out == {"without figures": 1}
    assert found.words() == (
        "warm start from old: the sampler knows 5 of its trials; tried first: 1; "
        "left out: 1 without figures"
    )


def test_what_did_not_fit_says_nothing_of_a_larger_budget(storage):
    found = look_back(study_of(storage, *TRIALS), replace(TASK, budget_bytes=400 * MIB))
    assert [one.state.name for one in found.shown] == ["COMPLETE"] * 3 + ["PRUNED"]
    assert found.left_out == {"without figures": 2}
    assert found.first == [{"model.width": 32, "optimizer.lr": 0.3}]


def test_what_ran_out_of_memory_is_known_by_what_was_predicted(storage):
    lost = trial(32, 0.3, Outcome.out_of_memory, 260, demand_bytes=1)
    found = look_back(study_of(storage, lost), TASK)
    assert found.shown[0].constraints[CONSTRAINT] == pytest.approx(160 * MIB / GIB)


def test_a_point_outside_of_the_space_is_left_out(storage):
    space = Space.parse({"model.width": "choice(8,16)", "optimizer.lr": "interval(0.0,0.15)"})
    found = look_back(study_of(storage, *TRIALS), replace(TASK, space=space))
    assert len(found.shown) == 1
    assert found.left_out == {"outside of the space": 5}


def test_what_is_varied_in_one_of_the_two_only(storage):
    space = Space.parse({"model.width": "choice(8,16,32)", "model.depth": "range(1,4)"})
    task = replace(TASK, space=space, fixed={"trainer.epochs": 4, "optimizer.lr": 0.2})
    found = look_back(study_of(storage, *TRIALS), task)
    assert [one.params for one in found.shown] == [{"model.width": 16, "model.depth": 2}]
    assert found.left_out == {"outside of the space": 5}


def test_figures_of_other_settings_do_not_compare(storage):
    old = study_of(storage, *TRIALS, setting={**FIXED, "trainer.epochs": 1})
    found = look_back(old, TASK)
    assert found.shown == []
    assert found.first == [
        {"model.width": 16, "optimizer.lr": 0.2},
        {"model.width": 8, "optimizer.lr": 0.1},
    ]
    assert found.changed == ["trainer.epochs"]
    assert "do not compare, since these differ: trainer.epochs" in found.words()


def test_they_are_shown_once_and_never_win(storage):
    old = study_of(storage, *TRIALS)
    new = study_of(storage, name="new")
    assert len(begin_warm(new, TASK, [old])) == 1
    assert begin_warm(new, TASK, [old]) == []
    trials = new.get_trials()
    assert [one.state.name for one in trials].count("WAITING") == 1
    assert sum(FROM in one.user_attrs for one in trials) == 5
    assert best_trial(trials, True, MAE) is None
    summary = summarize(new, 10, TASK.budget_bytes, "")
    assert (summary.finished, summary.infeasible_predicted, summary.pareto) == (0, 0, [])
    sampler = optuna.samplers.GPSampler(seed=0)
    shown = seen([one for one in trials if FROM in one.user_attrs], sampler, new.directions)
    assert all(one.state is TrialState.COMPLETE for one in shown), "GP reads no other"


def test_a_study_that_is_not_there_is_named_with_the_nearest(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study_of(storage, name="alternating_1GiB")
    with pytest.raises(ConfigError, match="did you mean 'alternating_1GiB'"):
        open_earlier("alternating_1GB", storage, TASK)
    with pytest.raises(ConfigError, match="goes on from its own trials"):
        open_earlier("alternating_1GiB", storage, replace(TASK, study="alternating_1GiB"))


def test_another_metric_or_other_data_are_refused(storage, tmp_path):
    study_of(storage, name="accuracy", metric=Metric("accuracy", goal="max"))
    with pytest.raises(ConfigError, match="it compared accuracy"):
        open_earlier("accuracy", storage, TASK)
    result = RunResult("completed", "epochs", data_fingerprint="abc")
    result.save(tmp_path)
    study_of(storage, trial(8, 0.1, Outcome.completed, 50, 3.0, run_dir=str(tmp_path)), name="d")
    assert open_earlier("d", storage, replace(TASK, data="abc")).study_name == "d"
    with pytest.raises(ConfigError, match="its data are others"):
        open_earlier("d", storage, replace(TASK, data="xyz"))


def test_the_folder_of_a_search_names_its_study_and_its_storage(tmp_path, storage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    elsewhere = optuna.storages.RDBStorage(url)
    study_of(elsewhere, *TRIALS, name="there")
    folder = tmp_path / "outputs/sweeps/there"
    folder.mkdir(parents=True)
    SweepSummary("there", 6, storage=url).save(folder)
    for name in ("there", str(folder), "outputs/sweeps/there"):
        found = open_earlier(name, storage, TASK)
        assert (found.study_name, len(found.trials)) == ("there", len(TRIALS))
        found._storage._backend.engine.dispose()
    elsewhere.engine.dispose()
