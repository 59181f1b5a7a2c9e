"""Whole runs: killed and resumed in real processes, grids, and a tracking server that is down."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from expt.reports.sources.mlflow import runs_by_id
from expt.result import load_result
from expt.run.process import TrialProcess

RUN = (
    "memory=minimal", "debug=smoke", "trainer.epochs=3", "trainer.steps_per_epoch=20",
    "trainer.max_steps=60", "trainer.checkpoint_every_steps=5", "hydra.run.dir=run",
    "model.num_stages=1", "model.embed_dim=16", "data.batch_size=4", "memory.plan=false",
)  # fmt: skip


def kill_at(process: TrialProcess, progress: Path, step: int) -> None:
    """Kill a process, and all it started, when progress.json passes a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if json.loads(progress.read_text())["step"] >= step:
                break
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()


def test_killed_twice_and_resumed_is_one_run_with_the_same_weights(
    expt, tmp_path, monkeypatch, forked
):
    from mlflow import MlflowClient

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    monkeypatch.chdir(cut)
    for step in (10, 45):  # in the first epoch and in the last
        process = forked.start(*RUN, "trainer.resume=true")
        kill_at(process, cut / "run/checkpoints/progress.json", step)
    # What was killed were processes of their own; this one shares nothing with them but the files.
    code, _, err = expt(*RUN, "trainer.resume=true", small=False)
    assert code == 0, err
    monkeypatch.chdir(whole)
    code, _, err = expt(*RUN, "tracking=none", small=False)
    assert code == 0, err
    result, expected = load_result(cut / "run"), load_result(whole / "run")
    assert result.resumed_from_step >= 40
    assert result.weights_sha256 == expected.weights_sha256
    assert result.metrics == pytest.approx(expected.metrics)
    client = MlflowClient(f"sqlite:///{cut}/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'expt'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == result.tracking["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/mae"] == pytest.approx(result.metrics["test/mae"])
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/mae")]
    assert sorted(set(steps)) == [20, 40, 60]
    names = {file.path for file in client.list_artifacts(run.info.run_id, "plots")}
    assert names == {f"plots/{name}.png" for name in ("forecast", "horizon", "sensors", "history")}


def test_resuming_a_completed_run_returns_its_result(expt, home):
    assert expt("hydra.run.dir=run")[0] == 0
    written = (home / "run/result.json").read_bytes()
    code, out, _ = expt("hydra.run.dir=run", "trainer.resume=true")
    assert code == 0
    assert "already completed" in out
    assert (home / "run/result.json").read_bytes() == written


def test_resuming_by_directory_takes_the_settings_from_there(expt, home, monkeypatch):
    (home / "lab_stop.py").write_text(STOPPING)
    monkeypatch.setenv("LAB", "stop")
    settings = ("model=stid", "model._target_=lab_stop.Net", "model.embed_dim=6")
    assert expt(*settings, "hydra.run.dir=runs/first")[0] == 143
    assert load_result(home / "runs/first").status == "stopped"
    monkeypatch.delenv("LAB")
    code, out, err = expt("trainer.resume=runs/first", "tracking=none", small=False)
    assert code == 0, err
    assert "at step 1" in out
    result = load_result(home / "runs/first")
    assert (result.status, result.resumed_from_step, result.steps) == ("completed", 1, 8)


STOPPING = """
import os, signal, torch
from expt.jobs.traffic.stid import STID


class Net(STID):
    def forward(self, **inputs):
        planned = type(inputs["speed"]) is not torch.Tensor
        wanted = "" if planned else os.environ.get("LAB", "")
        # The test comes after two validations of two batches each.
        self.seen = getattr(self, "seen", 0) + (not torch.is_grad_enabled())
        if wanted == "signal" and self.seen > 4:
            signal.raise_signal(signal.SIGTERM)
        if wanted == "bug" and self.seen > 4:
            raise RuntimeError("a bug in the test")
        if wanted == "stop":
            signal.raise_signal(signal.SIGTERM)
        return super().forward(**inputs)
"""


@pytest.mark.parametrize(
    ("how", "status", "reason"), [("signal", "stopped", "signal"), ("bug", "failed", "a bug")]
)
def test_what_ends_the_test_is_not_a_completed_run_and_can_be_resumed(
    expt, home, monkeypatch, how, status, reason
):
    (home / f"lab_{how}.py").write_text(STOPPING)
    settings = ("model=stid", f"model._target_=lab_{how}.Net", "hydra.run.dir=run")
    monkeypatch.setenv("LAB", how)
    if how == "bug":
        with pytest.raises(RuntimeError, match="a bug in the test"):
            expt(*settings)
    else:
        assert expt(*settings)[0] == 143
    result = load_result(home / "run")
    assert result.status == status
    assert reason in result.stop_reason
    assert result.metrics["test/mae"] is None
    monkeypatch.delenv("LAB")
    code, _, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    again = load_result(home / "run")
    assert (again.status, again.resumed_from_step) == ("completed", 8)
    assert again.metrics["test/mae"] > 0
    assert again.weights_sha256 == result.weights_sha256


@pytest.mark.parametrize("name", ["a,b", "a=b c", "it's"])
def test_a_refused_resume_spoils_nothing_whatever_the_folder_is_called(
    expt, home, monkeypatch, name
):
    (home / "lab_named.py").write_text(STOPPING)
    monkeypatch.setenv("LAB", "stop")
    quoted = name.replace("'", "\\'")
    assert expt("model=stid", "model._target_=lab_named.Net", f"hydra.run.dir='{quoted}'")[0] == 143
    monkeypatch.delenv("LAB")
    code, _, err = expt(f"trainer.resume={name}", "data.batch_size=0", small=False)
    assert code == 2
    assert "data.batch_size" in err
    code, _, err = expt(f"trainer.resume={name}", small=False)
    assert code == 0, err
    assert load_result(home / name).resumed_from_step == 1


def test_resuming_from_elsewhere_with_settings_of_ones_own(expt, home, monkeypatch):
    from mlflow import MlflowClient

    (home / "there/mine/model").mkdir(parents=True)
    (home / "there/lab_there.py").write_text(STOPPING)
    (home / "there/mine/model/own.yaml").write_text(
        "defaults: [stid, _self_]\n_target_: lab_there.Net\nembed_dim: 6\n"
    )
    (home / "here").mkdir()
    monkeypatch.chdir(home / "there")
    monkeypatch.setenv("LAB", "stop")
    arguments = ("--config-dir=mine", "model=own", "debug=smoke", "hydra.run.dir=run")
    assert expt(*arguments, small=False)[0] == 143
    monkeypatch.delenv("LAB")
    monkeypatch.chdir(home / "here")
    code, _, err = expt(f"trainer.resume={home}/there/run", small=False)
    assert code == 0, err
    assert list((home / "here").iterdir()) == []
    client = MlflowClient(f"sqlite:///{home}/there/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'expt'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"


def test_killed_between_its_result_and_the_trackers_answer(expt, home):
    from mlflow import MlflowClient

    assert expt("tracking=mlflow", "hydra.run.dir=run")[0] == 0
    result = load_result(home / "run")
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    client.update_run(result.tracking["run_id"], status="RUNNING")
    journal, state = home / "run/tracking.jsonl", home / "run/tracking.json"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert b'"end"' in lines[-1]
    journal.write_bytes(b"".join(lines[:-1]))
    state.write_text(json.dumps({**json.loads(state.read_text()), "applied": len(lines) - 1}))
    code, out, _ = expt("tracking=mlflow", "hydra.run.dir=run", "trainer.resume=true")
    assert code == 0
    assert "already completed" in out
    assert client.get_run(result.tracking["run_id"]).info.status == "FINISHED"


def test_nothing_to_resume_starts_afresh(expt, home):
    code, out, _ = expt("hydra.run.dir=run", "trainer.resume=true")
    assert code == 0
    assert "nothing to resume" in out
    assert load_result(home / "run").resumed_from_step == 0


def test_a_grid_is_three_children_under_one_parent_and_one_may_fail(expt, home):
    from mlflow import MlflowClient

    (home / "lab_grid.py").write_text(
        """
from expt.jobs.traffic.stid import STID


class Net(STID):
    def forward(self, **inputs):
        if self.sensor.shape[1] == 6:
            raise RuntimeError("my own bug")
        return super().forward(**inputs)
"""
    )
    with pytest.raises(RuntimeError, match="my own bug"):
        expt(
            "-m", "debug=smoke", "model=stid", "model._target_=lab_grid.Net",
            "model.embed_dim=4,6,8", "hydra.sweep.dir=sweep", "trainer.progress=false",
            small=False,
        )  # fmt: skip
    results = [load_result(home / "sweep" / name) for name in "012"]
    assert [result.status for result in results] == ["completed", "failed", "completed"]
    assert "my own bug" in results[1].stop_reason
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'expt'")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    (parent,) = {result.tracking["parent_run_id"] for result in results}
    assert runs[parent].info.status == "FAILED"
    children = [runs[result.tracking["run_id"]] for result in results]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    assert [run.info.status for run in children] == ["FINISHED", "FAILED", "FINISHED"]
    assert len(runs) == 4
    assert runs[parent].data.tags["child.1"] == results[1].tracking["run_id"]


def test_a_grid_with_a_refused_child_is_not_finished(expt, home):
    from mlflow import MlflowClient

    code, _, err = expt(
        "-m", "memory=minimal", "debug=smoke", "model.embed_dim=16,17", "hydra.sweep.dir=sweep",
        "trainer.progress=false", small=False,
    )  # fmt: skip
    assert code == 2
    assert "17" in err
    assert load_result(home / "sweep/0").status == "completed"
    assert not (home / "sweep/1").exists()
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'expt'")
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert sorted(statuses) == ["FAILED", "FINISHED"]


def test_a_failed_child_leaves_no_model_behind(expt, home):
    import gc

    (home / "lab_heavy.py").write_text(
        """
from expt.jobs.traffic.stid import STID


class Net(STID):
    def forward(self, **inputs):
        raise RuntimeError("my own bug")
"""
    )
    with pytest.raises(RuntimeError, match="my own bug") as held:
        expt("-m", "model=stid", "model._target_=lab_heavy.Net", "trainer.seed=1,2")
    gc.collect()
    left = [thing for thing in gc.get_objects() if type(thing).__module__ == "lab_heavy"]
    assert left == [], held


def test_training_goes_on_without_the_tracking_server_and_replays(expt, home):
    began = time.monotonic()
    code, _, err = expt(
        "tracking=mlflow", "tracking.uri=http://127.0.0.1:9", "hydra.run.dir=outputs/run"
    )
    assert code == 0
    assert "does not answer" in err
    assert "task=replay" in err
    assert time.monotonic() - began < 60
    assert load_result(home / "outputs/run").tracking["run_id"] is None
    assert (home / "outputs/run/tracking.jsonl").stat().st_size > 0
    code, out, _ = expt("task=replay", "tracking=none", small=False)
    assert code == 1
    assert "0 records sent" in out
    assert os.listdir(home / "outputs/run")


def test_a_run_that_left_the_test_out_is_tested_when_that_is_wanted(expt, home):
    lines = ("trainer.epochs=1", "hydra.run.dir=run", "trainer.resume=true")
    code, _, err = expt(*lines, "trainer.test=false")
    assert code == 0, err
    untested = load_result(home / "run")
    assert untested.metrics["val/mae"] > 0
    assert untested.metrics["test/mae"] is None
    code, out, err = expt(*lines, "trainer.test=false")
    assert "already completed" in out
    code, _, err = expt(*lines)
    assert code == 0, err
    tested = load_result(home / "run")
    assert tested.metrics["test/mae"] > 0
    assert tested.weights_sha256 == untested.weights_sha256
    assert tested.steps == untested.steps
    assert tested.metrics["val/mae"] == untested.metrics["val/mae"]
    _, out, _ = expt(*lines)
    assert "already completed" in out


def test_a_run_is_nested_under_the_run_of_the_folder_it_names(expt, home):
    from mlflow import MlflowClient

    tracking = ("tracking=mlflow", "trainer.epochs=1")
    assert expt(*tracking, "hydra.run.dir=parent")[0] == 0
    assert expt(*tracking, "hydra.run.dir=child", "tracking.parent=parent")[0] == 0
    parent, child = load_result(home / "parent"), load_result(home / "child")
    assert child.tracking["parent_run_id"] == parent.tracking["run_id"]
    run = MlflowClient(child.tracking["uri"]).get_run(child.tracking["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == parent.tracking["run_id"]


def rates(home, run: str) -> list[float]:
    return [row["rate"] for row in json.loads((home / run / "history.json").read_text())]


def test_an_extended_run_is_the_same_in_mlflow_and_its_schedule_begins_again(expt, home) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{home}/mlflow.db"
    line = ("tracking=mlflow", f"tracking.uri={store}", "hydra.run.dir=run", "trainer.epochs=2")
    code, _, err = expt(*line, "trainer.schedule=one_cycle", "trainer.eval_batches=1")
    assert code == 0, err
    first = load_result(home / "run")
    assert set(first.partial) == {"val", "test"}
    (record,) = runs_by_id(store, [first.tracking["run_id"]]).records
    assert record.partial == first.partial and record.settings["trainer.epochs"] == "2"
    longer = ("trainer.epochs=4", "trainer.eval_batches=null")
    code, out, err = expt("trainer.resume=run", *longer, small=False)
    assert code == 0, err
    assert "8 steps more than the run had; the schedule one_cycle begins again over them" in out
    result = load_result(home / "run")
    assert result.tracking["run_id"] == first.tracking["run_id"]
    run = MlflowClient(store).get_run(result.tracking["run_id"])
    assert run.info.status == "FINISHED"
    (record,) = runs_by_id(store, [run.info.run_id]).records
    assert record.settings["trainer.epochs"] == "4"
    assert (record.settings["trainer.eval_batches"], record.partial) == ("None", {})
    points = MlflowClient(store).get_metric_history(run.info.run_id, "val/mae")
    assert sorted({point.step for point in points}) == [4, 8, 12, 16]
    # The second cycle is like the first one: the same rates at the ends of its epochs.
    assert rates(home, "run")[2:] == pytest.approx(rates(home, "run")[:2])


def test_an_extension_that_is_killed_goes_on_in_its_own_schedule(expt, home, forked) -> None:
    """Killed by a model of the user's own; nothing is given again, and the weights are the same."""
    (home / "killing.py").write_text(KILLING)
    line = ("model=stid", "model._target_=killing.Net", "memory.plan=false", "trainer.epochs=2")
    line += ("trainer.schedule=one_cycle", "trainer.checkpoint_every_steps=1")
    for run in ("run", "whole"):
        code, _, err = expt(*line, f"hydra.run.dir={run}")
        assert code == 0, err
    assert expt("trainer.resume=whole", "trainer.epochs=4", small=False)[0] == 0
    code, said = forked.ended(forked.start("trainer.resume=run", "trainer.epochs=4", KILL_AT="6"))
    assert code == -signal.SIGKILL, said
    assert load_result(home / "run") is None
    code, out, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert "steps more" not in out
    result, whole = load_result(home / "run"), load_result(home / "whole")
    assert 8 < result.resumed_from_step < 16
    assert result.weights_sha256 == whole.weights_sha256
    assert rates(home, "run") == rates(home, "whole")


KILLING = """
import os
import signal
from expt.jobs.traffic.stid import STID


class Net(STID):
    left = int(os.environ.get("KILL_AT", "1000"))

    def forward(self, *args, **others):
        if self.training:
            Net.left -= 1
            if Net.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **others)
"""


def test_a_run_that_stopped_early_says_what_to_raise_and_goes_on(expt, home) -> None:
    line = ("hydra.run.dir=run", "trainer.epochs=9", "trainer.early_stopping_patience=1")
    assert expt(*line, "optimizer.lr=1e-15")[0] == 0
    first = load_result(home / "run")
    assert first.stop_reason == "early_stopping"
    code, out, _ = expt("trainer.resume=run", small=False)
    assert code == 0 and "early_stopping_patience=1 epochs went by" in out
    more = ("trainer.resume=run", "trainer.early_stopping_patience=null")
    code, out, err = expt(*more, "trainer.epochs=5", small=False)
    assert code == 0, err
    assert "steps more" not in out  # it is in the middle of its schedule
    assert load_result(home / "run").epochs == 5
