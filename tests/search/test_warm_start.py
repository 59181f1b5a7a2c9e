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
from expt.search.request import fixed_settings, resolved_settings
from expt.search.samplers import seen
from expt.search.space import Space
from expt.search.trial import CONSTRAINT, FROM, KIND
from expt.search.warm_start import (
    RESOLVED,
    SHOWN,
    Source,
    Task,
    begin_warm,
    identity_of,
    look_back,
    open_earlier,
    record_settings,
    settings_of,
)
from expt.search.winner import SweepSummary, best_trial, summarize
from expt.units import GIB, MIB

MAE = Metric("mae")
SPACE = Space.parse({"model.width": "choice(8,16,32)", "optimizer.lr": "interval(0.0,1.0)"})
FIXED = {"trainer.epochs": 4, "model.depth": 2, "trainer.device": "cpu"}
HERE = "sqlite:////here.db"
TASK = Task("new", HERE, SPACE, FIXED, MAE, ["val/mae"], budget_bytes=100 * MIB)


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


def study_of(storage, *trials, name="old", metric=MAE, setting=FIXED, sampler=None):
    study = optuna.create_study(
        study_name=name, storage=storage, direction=metric.direction, sampler=sampler
    )
    study.set_user_attr(ATTRIBUTE, metric.as_dict())
    study.set_user_attr(RESOLVED, dict(setting))
    study.set_user_attr("expt.space", SPACE.as_json())
    for one in trials:
        study.add_trial(one)
    return study


def source_of(storage, *trials, **more):
    study = study_of(storage, *trials, **more)
    return Source(study, identity_of(HERE, study.study_name))


TRIALS = (
    trial(8, 0.1, Outcome.completed, 50, 3.0),
    trial(16, 0.2, Outcome.completed, 90, 2.0),
    trial(32, 0.3, Outcome.completed, 150, 1.0),  # inside 200 MiB, not inside 100 MiB
    trial(32, 0.4, Outcome.predicted_over, 300),
    trial(32, 0.5, Outcome.failed, 60),
    trial(8, 0.6, Outcome.pruned, 60),
)


def test_what_fits_is_judged_by_the_new_budget(storage):
    found = look_back(source_of(storage, *TRIALS), TASK)
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


def test_what_was_trained_is_taken_to_fit_where_trials_are_adapted(storage):
    setting = {**FIXED, "memory.on_overflow": "adapt"}
    found = look_back(source_of(storage, *TRIALS, setting=setting), replace(TASK, fixed=setting))
    excess = [round(one.constraints[CONSTRAINT] * 1024) for one in found.shown]
    assert excess == [-50, -10, 0, 200, -40], "only the least of all techniques says something"
    assert found.first == [{"model.width": 32, "optimizer.lr": 0.3}]


def test_what_was_chosen_for_a_trial_is_where_it_was(storage):
    """Its batch was taken in four parts, whatever its study had for all."""
    chosen = trial(8, 0.1, Outcome.completed, 50, 3.0, techniques={"memory.parts": 4})
    space = Space.parse({"model.width": "choice(8,16,32)", "memory.parts": "choice(1,2,4)"})
    setting = {**FIXED, "memory.parts": 1}
    task = replace(TASK, space=space, fixed={**FIXED, "optimizer.lr": 0.1})
    found = look_back(source_of(storage, chosen, setting=setting), task)
    assert [one.params for one in found.shown] == [{"model.width": 8, "memory.parts": 4}]


def test_what_did_not_fit_says_nothing_of_a_larger_budget(storage):
    found = look_back(source_of(storage, *TRIALS), replace(TASK, budget_bytes=400 * MIB))
    assert [one.state.name for one in found.shown] == ["COMPLETE"] * 3 + ["PRUNED"]
    assert found.left_out == {"without figures": 2}
    assert found.first == [{"model.width": 32, "optimizer.lr": 0.3}]


def test_what_ran_out_of_memory_is_known_by_what_was_predicted(storage):
    lost = trial(32, 0.3, Outcome.out_of_memory, 260, demand_bytes=1)
    found = look_back(source_of(storage, lost), TASK)
    assert found.shown[0].constraints[CONSTRAINT] == pytest.approx(160 * MIB / GIB)


def test_a_point_outside_of_the_space_is_left_out(storage):
    space = Space.parse({"model.width": "choice(8,16)", "optimizer.lr": "interval(0.0,0.15)"})
    found = look_back(source_of(storage, *TRIALS), replace(TASK, space=space))
    assert len(found.shown) == 1
    assert found.left_out == {"outside of the space": 5}


def test_what_is_varied_in_one_of_the_two_only(storage):
    space = Space.parse({"model.width": "choice(8,16,32)", "model.depth": "range(1,4)"})
    task = replace(TASK, space=space, fixed={**FIXED, "optimizer.lr": 0.2})
    found = look_back(source_of(storage, *TRIALS), task)
    assert [one.params for one in found.shown] == [{"model.width": 16, "model.depth": 2}]
    assert found.left_out == {"outside of the space": 5}


def test_a_setting_whose_value_is_not_known_now_leaves_no_point_out(storage):
    space = Space.parse({"model.width": "choice(8,16,32)"})
    source = source_of(storage, *TRIALS)
    for now, count in (("${oc.env:LR}", 5), (0.2, 1)):
        task = replace(TASK, space=space, fixed={**FIXED, "optimizer.lr": now})
        assert len(look_back(source, task).shown) == count


def test_a_setting_that_is_not_a_number_is_the_same_then_and_now(storage):
    nan = float("nan")
    varied = Space.parse({"data.fill": "choice(nan,0.0)"})
    old = study_of(storage, setting=FIXED)
    old.set_user_attr("expt.space", varied.as_json())
    old.add_trial(create_trial(value=1.0, params={"data.fill": nan}, user_attrs={KIND: "completed"},
                               distributions=varied.distributions))  # fmt: skip
    task = replace(TASK, space=Space.parse({"model.depth": "range(1,4)"}), budget_bytes=None)
    for fill, count in ((float("nan"), 1), (0.0, 0)):
        fixed = {"trainer.epochs": 4, "trainer.device": "cpu", "data.fill": fill}
        found = look_back(Source(old, identity_of(HERE, "old")), replace(task, fixed=fixed))
        assert (found.changed, len(found.shown)) == ([], count)


def test_figures_of_other_settings_do_not_compare(storage):
    old = source_of(storage, *TRIALS, setting={**FIXED, "trainer.epochs": 1})
    found = look_back(old, TASK)
    assert found.shown == []
    assert found.first == [
        {"model.width": 16, "optimizer.lr": 0.2},
        {"model.width": 8, "optimizer.lr": 0.1},
    ]
    assert found.changed == ["trainer.epochs"]
    assert "do not compare, since these differ: trainer.epochs" in found.words()


@pytest.mark.parametrize(
    ("name", "now"),
    [("trainer.device", "cuda"), ("trainer.compile", "off"), ("memory.card", "80GiB"),
     ("memory.target", "cuda")],
)  # fmt: skip
def test_peaks_of_another_device_are_not_shown(storage, name, now):
    found = look_back(source_of(storage, *TRIALS), replace(TASK, fixed={**FIXED, name: now}))
    assert found.shown == []
    assert found.changed == [name]
    assert len(found.first) == 2


def test_the_mean_of_other_repeats_does_not_compare(storage):
    found = look_back(source_of(storage, *TRIALS), replace(TASK, repeats=3))
    assert (found.shown, found.changed) == ([], ["search.repeats"])


def test_what_was_varied_is_what_the_space_says_and_not_a_trial(storage):
    """Its first trial is of another hand, without parameters."""
    old = source_of(storage, create_trial(value=1.0), *TRIALS)
    space = Space.parse({"model.width": "choice(8,16,32)"})
    found = look_back(old, replace(TASK, space=space, fixed={**FIXED, "optimizer.lr": 0.2}))
    assert (found.changed, len(found.shown)) == ([], 1)


def test_a_restart_on_another_device_leaves_several(storage):
    study = study_of(storage, *TRIALS)
    record_settings(study, replace(TASK, fixed={**FIXED, "trainer.device": "cuda"}))
    assert settings_of(study) == {**FIXED, "trainer.device": "several"}


WRITTEN = {
    "memory.preset": "minimal", "trainer.epochs": 4,
    "model.depth": "${by_preset:{full:4,lite:2,minimal:2}}",
}  # fmt: skip


def test_an_interpolation_is_compared_by_its_value(storage, composed):
    space = Space.parse({"model.embed_dim": "choice(8,48)", "memory.precision": "choice(fp32)"})
    cfg = composed("+memory=minimal")
    found = resolved_settings(cfg, space, "cpu")
    assert "${" in fixed_settings(cfg, space)["model.num_stages"]
    assert (found["model.num_stages"], found["model.patch_sizes"]) == (2, [1])
    assert found["trainer.device"] == "cpu" and "model.embed_dim" not in found
    assert "trainer.progress" not in found
    cfg.model.num_heads = "${model.embed_dim}"
    assert resolved_settings(cfg, space, "cpu")["model.num_heads"] == "${model.embed_dim}"


def test_interpolations_of_an_earlier_version_get_their_values(storage, tmp_path, composed):
    old = study_of(storage, *TRIALS)
    old.set_user_attr(RESOLVED, None)
    old.set_user_attr("expt.setting", WRITTEN)
    space = Space.parse({"model.depth": "range(1,4)", "model.width": "choice(8,16,32)"})
    fixed = {"memory.preset": "minimal", "trainer.epochs": 4, "optimizer.lr": 0.2}
    source = Source(old, identity_of(HERE, "old"))
    task = replace(TASK, space=space, fixed={**fixed, "trainer.device": "cpu"})
    assert look_back(source, task).changed == ["trainer.device"], "which is not known"
    RunResult("completed", "epochs", device="cpu (x86_64)").save(tmp_path)
    old.add_trial(trial(16, 0.2, Outcome.completed, 90, 2.0, run_dir=str(tmp_path)))
    found = look_back(source, task)
    assert [one.params for one in found.shown] == [{"model.width": 16, "model.depth": 2}] * 2
    old.set_user_attr("expt.setting", {**WRITTEN, "model.depth": 2, "model.heads": "${gone}"})
    fixed |= {"model.heads": 4, "trainer.device": "cpu"}
    assert look_back(source, replace(task, fixed=fixed)).changed == [], "nobody knows what it was"


@pytest.mark.parametrize("name", ["NSGAIISampler", "RandomSampler", "CmaEsSampler"])
def test_a_sampler_that_reads_no_added_trial_is_shown_none(storage, name):
    old = source_of(storage, *TRIALS)
    made = getattr(optuna.samplers, name)()
    new = study_of(storage, name="new", sampler=made)
    (line,) = begin_warm(new, TASK, [old])
    assert line == (
        "warm start from old: this sampler learns from no trials but its own; tried first: 2; "
        "left out: 1 without figures"
    )
    assert [one.state.name for one in new.get_trials()] == ["WAITING", "WAITING"]


def test_a_grid_is_given_nothing(storage):
    old = source_of(storage, *TRIALS)
    grid = optuna.samplers.GridSampler({"x": [1, 2]})
    new = study_of(storage, name="new", sampler=grid)
    assert begin_warm(new, TASK, [old]) == [
        "warm start: a grid tries every point, so that it needs nothing of earlier studies"
    ]
    assert new.get_trials() == []
    assert begin_warm(new, TASK, []) == [], "nothing was asked for"


def test_points_are_still_drawn_at_random_below_the_samplers_own_number(storage):
    old = source_of(storage, *TRIALS)
    new = study_of(storage, name="new", sampler=optuna.samplers.TPESampler())
    assert "5 trials are fewer than 10" in begin_warm(new, TASK, [old])[1]


def test_studies_of_one_name_are_told_apart_by_their_storage(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    elsewhere = optuna.storages.RDBStorage(url)
    study_of(elsewhere, *TRIALS, name="new")
    elsewhere.engine.dispose()
    SweepSummary("new", 6, storage=url).save(tmp_path / "there")
    other = open_earlier("there", storage, TASK)
    mine = Source(study_of(storage, *TRIALS[:2], name="old"), identity_of(HERE, "old"))
    new = study_of(storage, name="new")
    assert len(begin_warm(new, TASK, [mine, other])) == 3, "two, and that they are few"
    assert new.user_attrs[SHOWN] == [f"{HERE} old", f"{url} new"]
    assert begin_warm(new, TASK, [mine, other]) == []
    new.set_user_attr(SHOWN, ["old"])  # as earlier versions wrote it
    assert len(begin_warm(new, TASK, [mine])) == 0
    other.study._storage._backend.engine.dispose()
    with pytest.raises(ConfigError, match="goes on from its own trials"):
        open_earlier("there", storage, replace(TASK, storage=url))


def test_a_password_does_not_tell_storages_apart():
    bare = identity_of("postgresql://me@h/d", "a")
    assert identity_of("postgresql://me:geheim@h/d", "a") == bare
    assert identity_of("postgresql://me:***@h/d", "a") == bare
    assert identity_of("postgresql://me@h/e", "a") != bare


def test_a_folder_whose_study_is_gone_leaves_nothing_behind(storage, tmp_path):
    gone = tmp_path / "gone.db"
    SweepSummary("old", 6, storage=f"sqlite:///{gone}").save(tmp_path / "there")
    with pytest.raises(ConfigError, match=r"search\.warm_start=.*there is no file") as refused:
        open_earlier(str(tmp_path / "there"), storage, TASK)
    assert not gone.exists()
    assert "search.storage" not in str(refused.value)


def test_they_are_shown_once_and_never_win(storage):
    old = source_of(storage, *TRIALS)
    new = study_of(storage, name="new", sampler=optuna.samplers.TPESampler(n_startup_trials=5))
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


@pytest.mark.parametrize("killed_at", [0, 3, 5])
def test_a_start_that_was_killed_is_gone_on_with(storage, monkeypatch, killed_at):
    old = source_of(storage, *TRIALS)
    new = study_of(storage, name="new", sampler=optuna.samplers.TPESampler())
    create = storage.create_new_trial
    left = [killed_at]

    def dying(*arguments, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return create(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_new_trial", dying)
        with pytest.raises(KeyboardInterrupt):
            begin_warm(new, TASK, [old])
    assert len(new.get_trials()) == killed_at
    begin_warm(new, TASK, [old])
    trials = new.get_trials()
    shown = [one.user_attrs[FROM] for one in trials if FROM in one.user_attrs]
    assert len(set(shown)) == len(shown) == 5
    assert all(one.startswith(f"{HERE} old ") for one in shown)
    assert [one.state.name for one in trials].count("WAITING") == 1
    new.set_user_attr(SHOWN, [])  # killed after the point was put first
    begin_warm(new, TASK, [old])
    assert len(new.get_trials()) == len(trials)


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
    assert open_earlier("d", storage, replace(TASK, data="abc")).study.study_name == "d"
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
        assert (found.study.study_name, len(found.study.trials)) == ("there", len(TRIALS))
        assert found.identity == f"{url} there"
        found.study._storage._backend.engine.dispose()
    elsewhere.engine.dispose()
