"""Runs in stages: other weights from some epoch on, one plan, the same weights after a resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from expt.memory.planning.plan import Plan, StagePeak
from expt.result import load_result
from expt.run.stages import compared, joined, stage_lines

MODEL = """
import os
from torch import nn


class Net(nn.Module):
    calls = 0

    def __init__(self, num_inputs, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_inputs, 256), nn.ReLU(), nn.Linear(256, 256))
        self.head = nn.Linear(256, num_classes)

    def forward(self, x):
        Net.calls += self.training
        if self.training and Net.calls == int(os.environ.get("LAB_FAIL_AT", "0")):
            raise RuntimeError("a fault of mine")
        return self.head(self.body(x))
"""
STAGES = "trainer.trainable={0: ['head.*'], 1: ['head.*', 'body.2.*'], 2: ['body.*']}"


@pytest.fixture
def line(toys: Path, home: Path) -> tuple[str, ...]:
    (home / "lab_stages.py").write_text(MODEL)
    return (
        f"--config-dir={toys / 'conf'}", "data=blobs", "model=classifier", "tracking=none",
        "model._target_=lab_stages.Net", "trainer.epochs=4", "trainer.progress=false",
        "hydra.run.dir=run", "trainer.steps_per_epoch=5", "trainer.checkpoint_every_steps=2",
        "trainer.early_stopping_patience=null", "trainer.device=cpu", STAGES,
    )  # fmt: skip


def stored(home: Path, name: str) -> dict:
    return torch.load(home / name / "checkpoints/last.pt", weights_only=True)


def test_a_run_in_stages_is_planned_measured_and_told(expt, line, home) -> None:
    code, out, err = expt(*line, "hydra.run.dir=whole", small=False)
    assert code == 0, err
    result = load_result(home / "whole")
    assert result.stages is not None
    for stage in result.stages:
        assert stage["predicted_peak_bytes"] == pytest.approx(
            stage["peak_allocated_bytes"], rel=0.02
        )
    epochs = [(stage["first_epoch"], stage["last_epoch"]) for stage in result.stages]
    assert epochs == [(0, 0), (1, 1), (2, 3)]
    peaks = [stage["peak_allocated_bytes"] for stage in result.stages]
    assert peaks[0] < peaks[1] < peaks[2]
    assert result.memory["peak_allocated_bytes"] == max(peaks)
    assert abs(result.memory["prediction_error"]) < 0.02
    assert "(largest of 3 stages: epochs 2 to 3)" in out
    assert "stage 2 of 3, from epoch 1 on: 66,563 parameters of" in out
    assert "stage 3 of 3, from epoch 2 on" in out
    assert "stage of epochs 2 to 3: predicted, measured" in out
    state = stored(home, "whole")["optimizer"]["state"]
    counts = sorted(float(one["step"]) for one in state.values())
    assert counts == [10, 10, 15, 15], "body.0 was trained for two epochs, body.2 for three"
    rates = [row["rate"] for row in json.loads((home / "whole/history.json").read_text())]
    assert len(set(rates)) == 4, "one schedule over the whole run"


def test_a_run_that_was_broken_off_in_any_stage_comes_to_the_same_weights(
    expt, line, home, monkeypatch
) -> None:
    settings = (*line, "memory.plan=false", "trainer.ema_decay=0.9")
    assert expt(*settings, "hydra.run.dir=whole", small=False)[0] == 0
    whole = load_result(home / "whole")
    for fails_at in (8, 13):  # in the second stage, and in the third
        folder = f"hydra.run.dir=run{fails_at}"
        monkeypatch.setenv("LAB_FAIL_AT", str(fails_at))
        sys.modules["lab_stages"].Net.calls = 0
        with pytest.raises(RuntimeError, match="a fault of mine"):
            expt(*settings, folder, small=False)
        monkeypatch.delenv("LAB_FAIL_AT")
        assert expt(*settings, folder, "trainer.resume=true", small=False)[0] == 0
        result = load_result(home / f"run{fails_at}")
        assert result.resumed_from_step == 2 * ((fails_at - 1) // 2)
        assert result.weights_sha256 == whole.weights_sha256
        assert result.metrics == whole.metrics


def test_a_completed_run_is_not_extended_into_a_stage_that_it_was_not_made_for(
    expt, line, home
) -> None:
    short = (*line, "memory.plan=false", "trainer.resume=true", "trainer.epochs=2")
    assert expt(*short, small=False)[0] == 0
    code, _, err = expt(*short, "trainer.epochs=4", small=False)
    assert code == 2
    assert "begins with epoch 2, which this run of 2 epochs was not made for" in err
    alone = ("trainer.start_from=run", "trainer.trainable=[body.*]", "hydra.run.dir=alone")
    given = [one for one in line if "run.dir" not in one and one != STAGES]
    assert expt(*given, "memory.plan=false", *alone, small=False)[0] == 0


def test_the_plan_lists_all_stages_and_is_that_of_the_largest(expt, line, home) -> None:
    code, out, err = expt(*line, "task=plan", "memory.target=cpu", small=False)
    assert code == 0, err
    record = json.loads((home / "run/plan.json").read_text())
    peaks = [stage["peak_bytes"] for stage in record["stages"]]
    assert record["peak_bytes"] == max(peaks) > min(peaks)
    assert "stage 1 of 3, epoch 0: predicted peak" in out
    assert "largest of 3 stages" in out
    assert Plan.from_dict(record).stages[1].peak_bytes == peaks[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("trainer.trainable={0: ['head.*'], 2: ['bdy.*']}",), "trainer.trainable.2: 'bdy.*'"),
        (("memory.weight_offload=true",), "keeps on the host what is frozen"),
        (("memory.budget=0.5MiB",), "is predicted to be too small"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(expt, line, home, more, words) -> None:
    given = [one for one in line if one.partition("=")[0] != more[0].partition("=")[0]]
    code, _, err = expt(*given, *more, small=False)
    assert code == 2
    assert words in err
    assert not (home / "run/checkpoints").exists()


def of_peak(peak: int, high: int | None = 100) -> Plan:
    categories = {"activations": peak}
    return Plan("cpu", peak, None, (peak, high), "backward", categories, {}, {}, "trace", 0.5)


def test_the_largest_stage_counts_and_an_unknown_bound_of_any() -> None:
    class Of:
        def __init__(self, first: int, last: int) -> None:
            self.first_epoch, self.last_epoch, self.patterns = first, last, ("*",)

    stages = [Of(0, 3), Of(4, 9)]
    found = joined([of_peak(5), of_peak(8)], stages)
    assert (found.peak_bytes, found.seconds, found.interval_bytes) == (8, 1.0, (8, 100))
    assert found.notes == ("largest of 2 stages: epochs 4 to 9",)
    assert joined([of_peak(5, None), of_peak(8)], stages).interval_bytes == (8, None)
    lines = stage_lines([vars(stage) for stage in found.stages])
    assert lines[1].startswith("stage 2 of 2, epochs 4 to 9")
    assert found.stages[0] == StagePeak(0, 3, 5, 5)
    rows = [{"peak_allocated_bytes": float(n)} for n in (4, 6, 5)]
    assert [one["peak_allocated_bytes"] for one in compared(found, rows)] == [6, None]
