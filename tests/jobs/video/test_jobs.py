"""The two jobs on clips from the command line, at smoke size."""

from __future__ import annotations

import json
import sys

import pytest
from videos import write_classes

from expt.result import load_result

pytest.importorskip("av")
QUICK = ("tracking=none", "trainer.progress=false", "debug=smoke", "hydra.run.dir=run")


def test_video_is_trained_tested_and_drawn(expt, home, capfd, drawn):
    line = ("experiment=video", "+memory=minimal", "model.width=4", "loader.num_workers=2")
    code, out, err = expt(*line, *QUICK, "trainer.eval_batches=null", small=False)
    assert code == 0, err
    assert "manipulation: 6 classes, 180 / 36 / 72 videos" in out
    assert "2 workers hold up to 4 batches of" in out
    result = load_result(home / "run")
    assert result.monitor == "accuracy"
    assert {"test/accuracy", "test/top5", "test/clip_accuracy", "test/accuracy_unseen_camera"} <= {
        name for name, value in result.metrics.items() if value is not None
    }
    assert result.loader["num_workers"] == 2 and result.loader["batch_bytes"] > 0
    assert (home / "run/plots/confusion.png").stat().st_size > 5000
    assert abs(result.memory["prediction_error"]) < 0.2


def test_deepfakes_are_scored_by_auc(expt, home, drawn):
    line = ("experiment=deepfake", "+memory=minimal", "model.width=4", "data.pixels=32")
    code, _, err = expt(*line, *QUICK, small=False)
    assert code == 0, err
    result = load_result(home / "run")
    assert (result.monitor, result.metric().goal) == ("auc", "max")
    assert 0 <= result.metrics["test/eer"] <= 1
    assert (home / "run/plots/roc.png").stat().st_size > 5000


def test_a_run_that_is_tuned_says_so_and_keeps_its_batch(expt, home):
    line = (
        "experiment=video", "model.width=4", "data.tune=true", "loader.num_workers=0",
        "memory.budget=400MiB", "trainer.epochs=2", "trainer.test=false", *QUICK[:2], QUICK[3],
        "trainer.eval_batches=1", "data.pixels=32", "data.frames=4",
    )  # fmt: skip
    code, out, err = expt(*line, small=False)
    assert code == 0, err
    result = load_result(home / "run")
    changed = {change["setting"]: change["value"] for change in result.tuned}
    assert changed["memory.gradient_accumulation"] == 2  # of 4, since most of the budget is free
    assert "tuned: memory.gradient_accumulation=2 from the next epoch on (the peak is" in out
    history = json.loads((home / "run/history.json").read_text())
    assert [row["step"] for row in history] == [12, 24]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data.path=absent",), "data.path=absent: there is no such folder"),
        (("data.frames=0",), "data.frames must be at least 1, got 0"),
        (("model.depth=19",), "model.depth=19 is no depth"),
        (("loader.num_workers=9999",), "more than the"),
    ],
)
def test_mistakes_are_one_line(expt, home, change, message):
    code, _, err = expt("experiment=video", *QUICK, *change, small=False)
    assert code == 2
    assert message in err
    assert not (home / "run").exists() or not (home / "run/result.json").exists()


def test_a_damaged_file_is_named_before_training_or_left_out(expt, home):
    root = write_classes(home / "videos", videos=8)
    (root / "train/left/bad.mp4").write_bytes(b"")
    line = (
        "experiment=video", f"data.path={root}", "data.subsets=null", "model.width=4", *QUICK,
        "data.pixels=16", "data.frames=4", "+memory=minimal",
    )  # fmt: skip
    code, _, err = expt(*line, small=False)
    assert code == 2
    assert "1 of 25 videos cannot be read" in err and "bad.mp4" in err
    code, out, err = expt(*line, "loader.on_bad_sample=skip", small=False)
    assert code == 0, err
    assert "1 videos cannot be read and are left out" in out


def test_without_av_there_is_one_line(expt, home, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = expt("experiment=video", *QUICK, "data.index_cache=null", small=False)
    assert code == 2
    assert "pip install 'expt[video]'" in err
