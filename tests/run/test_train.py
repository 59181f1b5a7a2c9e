"""What a run does about memory outside its steps, and what it leaves behind when it is resumed."""

from __future__ import annotations

import json

import torch

from expt.result import load_result
from expt.run import train as train_job

MODEL = """
import torch
from expt.jobs.traffic.stid import STID


class Net(STID):
    trained = 0

    def train(self, mode=True):
        Net.trained += mode
        if mode and Net.trained == 3:  # after the first validation
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().train(mode)
"""
STID = ("model=stid", "memory.plan=false", "hydra.run.dir=run")


class Lack:
    """Runs out of memory the first time, then calls on."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return self.function(*arguments)


def test_a_lack_of_memory_after_the_last_step_is_recovered(expt, home, monkeypatch) -> None:
    hashed = Lack(train_job.checkpoint.weights_sha256)
    monkeypatch.setattr(train_job.checkpoint, "weights_sha256", hashed)
    evaluate, computed = train_job.evaluate, []

    def evaluate_and_fail(*arguments):
        metrics = evaluate(*arguments)
        metrics.compute = Lack(metrics.compute)
        computed.append(metrics.compute)
        return metrics

    monkeypatch.setattr(train_job, "evaluate", evaluate_and_fail)
    code, out, err = expt(*STID)
    assert code == 0, err
    result = load_result(home / "run")
    assert result.status == "completed"
    assert len(result.weights_sha256) == 64
    assert result.metrics["test/mae"] > 0
    assert (hashed.calls, [one.calls for one in computed]) == (2, [2])
    assert [event["phase"] for event in result.oom_events] == ["conclusion", "conclusion"]
    assert out.count("while the run was concluded") == 2


def test_a_plot_that_fails_is_a_note_under_a_training_that_is_well(expt, home, monkeypatch) -> None:
    def fail(*arguments):
        raise KeyError("no such sensor")

    monkeypatch.setattr("expt.jobs.traffic.data.TrafficData.plots", fail)
    code, out, err = expt(*STID)
    assert code == 0, err
    assert "note: a plot of this run cannot be drawn (KeyError: 'no such sensor')" in out
    assert load_result(home / "run").status == "completed"


def test_what_is_replayed_is_recorded_once(expt, home) -> None:
    (home / "lab_replayed.py").write_text(MODEL)
    code, out, err = expt(
        *STID, "model._target_=lab_replayed.Net", "trainer.log_every_steps=1",
        "trainer.checkpoint_every_steps=3", "tracking=mlflow", "tracking.uri=http://127.0.0.1:9",
        "tracking.flush_seconds=0",
    )  # fmt: skip
    assert code == 0, err
    assert "back at step 3: the steps up to 4 are done again" in out
    lines = map(json.loads, (home / "run/tracking.jsonl").read_text().splitlines())
    points = [
        (name, line["step"])
        for line in lines
        if line["kind"] == "metrics"
        for name in line["values"]
        if name.startswith("train/")
    ]
    steps = [step for name, step in points if name == "train/loss_step"]
    assert steps == list(range(1, 9))
    assert len(points) == len(set(points))


def test_readings_go_on_when_a_run_is_resumed(expt, home) -> None:
    (home / "lab_stopped.py").write_text(MODEL)
    settings = ("trainer.checkpoint_every_steps=3", "memory.recover=false")
    assert expt(*STID, "model._target_=lab_stopped.Net", *settings)[0] == 1
    first = readings(home)
    assert first
    assert first[-1] <= 3
    code, _, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    both = readings(home)
    assert both[: len(first)] == first
    assert len(both) > len(first)
    assert both[len(first)] == 4, "the resumed run counts on from its checkpoint"


def readings(home) -> list[int]:
    """Return the steps of the run's table."""
    rows = (home / "run/memory.csv").read_text().splitlines()[1:]
    assert {row.split(",")[1] for row in rows} == {"host"}
    return [int(row.split(",")[0]) for row in rows]


def test_what_says_where_a_run_is_kept_or_planned_is_no_parameter_of_it() -> None:
    from expt.run.train import _parameters

    resolved = {
        "model": {"embed_dim": 8},
        "memory": {"plan_file": "trial_003/plan.json", "budget": None},
        "search": {"storage": "postgresql://me:word@host/db", "trial": 3},
        "tracking": {"uri": "x"},
    }
    assert _parameters(resolved) == {
        "model": {"embed_dim": 8}, "memory": {"budget": None}, "search": {"trial": 3},
    }  # fmt: skip
    assert _parameters({**resolved, "search": None})["search"] is None
    assert resolved["memory"]["plan_file"], "the run itself still reads it"
