"""Whole runs: killed and resumed in real processes, grids, and a tracking server that is down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expt.results import load_result

RUN = (
    "memory=minimal", "debug=smoke", "trainer.epochs=3", "trainer.steps_per_epoch=20",
    "trainer.max_steps=60", "trainer.checkpoint_every_steps=5", "hydra.run.dir=run",
)  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "expt", *arguments], cwd=folder, stdout=log, stderr=log
        )


def kill_at(process: subprocess.Popen[bytes], progress: Path, step: int) -> None:
    """Kill -9 when progress.json passes a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if json.loads(progress.read_text())["step"] >= step:
                break
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_three_times_and_resumed_is_one_run_with_the_same_weights(tmp_path):
    from mlflow import MlflowClient

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    undisturbed = start(whole, *RUN, "tracking=none")
    for step in (10, 25, 45):
        process = start(cut, *RUN, "trainer.resume=true")
        kill_at(process, cut / "run/checkpoints/progress.json", step)
    assert undisturbed.wait() == 0, (whole / "log").read_text()
    assert start(cut, *RUN, "trainer.resume=true").wait() == 0, (cut / "log").read_text()
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
    assert names == {"plots/forecast.png", "plots/horizon.png", "plots/history.png"}


def test_resuming_a_completed_run_returns_its_result(expt, home):
    assert expt("hydra.run.dir=run")[0] == 0
    written = (home / "run/result.json").read_bytes()
    code, out, _ = expt("hydra.run.dir=run", "trainer.resume=true")
    assert code == 0
    assert "already completed" in out
    assert (home / "run/result.json").read_bytes() == written


def test_resuming_by_directory_takes_the_settings_from_there(expt, home, monkeypatch):
    (home / "lab_stop.py").write_text(
        """
import os, signal
from expt.models.stid import STID


class Net(STID):
    def forward(self, **inputs):
        if "LAB_STOP" in os.environ:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(**inputs)
"""
    )
    monkeypatch.setenv("LAB_STOP", "1")
    settings = ("model=stid", "model._target_=lab_stop.Net", "model.embed_dim=6")
    assert expt(*settings, "hydra.run.dir=runs/first")[0] == 143
    assert load_result(home / "runs/first").status == "stopped"
    monkeypatch.delenv("LAB_STOP")
    code, out, err = expt("trainer.resume=runs/first", "tracking=none", small=False)
    assert code == 0, err
    assert "at step 1" in out
    result = load_result(home / "runs/first")
    assert (result.status, result.resumed_from_step, result.steps) == ("completed", 1, 8)


def test_nothing_to_resume_starts_afresh(expt, home):
    code, out, _ = expt("hydra.run.dir=run", "trainer.resume=true")
    assert code == 0
    assert "nothing to resume" in out
    assert load_result(home / "run").resumed_from_step == 0


def test_a_grid_is_three_children_under_one_parent_and_one_may_fail(expt, home):
    from mlflow import MlflowClient

    (home / "lab_grid.py").write_text(
        """
from expt.models.stid import STID


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
