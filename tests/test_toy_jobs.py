"""Two jobs that are not traffic, each one class and one YAML: everything holds for them as well."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from expt.result import Outcome, load_result

JOBS = ("blobs", "clips")
STEPS = ("trainer.epochs=4", "trainer.steps_per_epoch=6", "trainer.checkpoint_every_steps=2")


def job(toys: Path, name: str, *more: str) -> tuple[str, ...]:
    """Return the command line of a toy job."""
    chosen = (f"--config-dir={toys / 'conf'}", f"data={name}", "model=classifier")
    return (*chosen, "tracking=none", "trainer.progress=false", "trainer.schedule=constant", *more)


@pytest.mark.parametrize("name", JOBS)
def test_the_best_epoch_is_the_one_of_the_highest_accuracy(expt, toys, clips, home, name) -> None:
    line = job(toys, name, "trainer.epochs=5", "optimizer.lr=0.05", "hydra.run.dir=run")
    code, out, err = expt(*line, small=False)
    assert code == 0, err
    result = load_result(home / "run")
    history = json.loads((home / "run/history.json").read_text())
    assert result.monitor == "accuracy"
    assert result.metrics["val/accuracy"] == max(row["val"] for row in history) > 0.5
    assert set(result.metrics) == {"val/accuracy", "test/accuracy", "test/loss"}
    assert result.outcome is Outcome.completed
    assert re.search(r"validation accuracy \(best\) +\d+\.\d %", out)
    assert "MAE" not in out and "mph" not in out
    assert result.metric().goal == "max" and result.unit is None
    progress = json.loads((home / "run/checkpoints/progress.json").read_text())
    assert progress["val/accuracy"] == history[-1]["val"]
    assert ("data_seconds" in history[-1]) == (name == "clips")
    predicted = result.memory["predicted_peak_bytes"]
    peak = result.memory["peak_allocated_bytes"]
    assert predicted == pytest.approx(peak, rel=0.05, abs=16 * 1024)  # a few small tensors


def test_another_metric_can_be_monitored_and_a_wrong_one_is_refused(expt, toys, home) -> None:
    line = job(toys, "blobs", "trainer.epochs=2", "hydra.run.dir=run")
    assert expt(*line, "trainer.monitor=loss", small=False)[0] == 0
    result = load_result(home / "run")
    history = json.loads((home / "run/history.json").read_text())
    assert result.metrics["val/loss"] == min(row["val"] for row in history)
    code, _, err = expt(*line, "trainer.monitor=acuracy", "hydra.run.dir=other", small=False)
    assert code == 2
    assert "trainer.monitor=acuracy" in err and "accuracy" in err
    assert not (home / "other").exists()


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_data_with_an_empty_part_are_refused_before_the_training(expt, toys, home, part) -> None:
    line = job(toys, "blobs", "trainer.epochs=1", f"+data.empty=[{part}]")
    code, out, err = expt(*line, "hydra.run.dir=run", small=False)
    assert code == 2 and f"error: Blobs has no samples in its {part} part" in err
    assert "step" not in out and not (home / "run").exists()
    if part == "test":
        assert "set trainer.test=false" in err
        code, _, err = expt(*line, "trainer.test=false", "hydra.run.dir=run", small=False)
        assert code == 0, err


KILLING_MODEL = """
import os
import signal
from blobs import Classifier


class Net(Classifier):
    left = int(os.environ.get("KILL_AT", "1000"))

    def forward(self, x):
        if self.training:
            Net.left -= 1
            if Net.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("name", "kills", "workers"), [("blobs", (15,), (0, 0)), ("clips", (5, 9), (2, 0, 2))], ids=JOBS
)
def test_killed_again_and_again_it_ends_with_the_same_weights(
    expt, toys, clips, home, forked, name, kills, workers
):
    (home / "killing.py").write_text(KILLING_MODEL)
    line = job(toys, name, *STEPS, "model._target_=killing.Net", "model.dropout=0.2")
    line += ("memory.plan=false",)
    code, _, err = expt(*line, "hydra.run.dir=whole", "loader.num_workers=0", small=False)
    assert code == 0, err
    resume = ("trainer.resume=true", "hydra.run.dir=run")
    for at, count in zip(kills, workers, strict=False):
        arguments = (*line, f"loader.num_workers={count}", *resume)
        code, said = forked.ended(forked.start(*arguments, KILL_AT=str(at)))
        assert code == -signal.SIGKILL, said
    code, _, err = expt(*line, f"loader.num_workers={workers[-1]}", *resume, small=False)
    assert code == 0, err
    result, expected = load_result(home / "run"), load_result(home / "whole")
    assert result.resumed_from_step >= 12
    assert result.weights_sha256 == expected.weights_sha256
    assert result.metrics == expected.metrics


OOM_MODEL = """
import torch
from blobs import Classifier


class Net(Classifier):
    calls = 0

    def forward(self, x):
        if torch.is_grad_enabled() and self.training and type(x) is torch.Tensor:
            Net.calls += 1
            if Net.calls in (5, 12):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().forward(x)
"""


def test_a_lack_of_memory_loses_nothing_and_reads_nothing_twice(expt, toys, clips, home) -> None:
    (home / "lacking.py").write_text(OOM_MODEL)
    log = home / "reads"
    line = job(toys, "clips", *STEPS, f"data.log={log}", "memory.plan=false", "trainer.test=false")
    assert expt(*line, "hydra.run.dir=whole", small=False)[0] == 0
    undisturbed = Counter(line.split()[1] for line in log.read_text().splitlines())
    log.unlink()
    code, _, err = expt(*line, "model._target_=lacking.Net", "hydra.run.dir=run", small=False)
    assert code == 0, err
    result, expected = load_result(home / "run"), load_result(home / "whole")
    assert len(result.oom_events) == 2
    assert result.metrics == pytest.approx(expected.metrics)
    assert Counter(line.split()[1] for line in log.read_text().splitlines()) == undisturbed
    import torch

    weights = [
        torch.load(home / run / "checkpoints/last.pt", weights_only=True)["model"]
        for run in ("run", "whole")
    ]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("mode", "exact"), [("batch", False), ("group", True)])
def test_what_batch_normalisation_makes_inexact_is_said(expt, toys, home, mode, exact) -> None:
    (home / "lacking.py").write_text(OOM_MODEL.replace("(5, 12)", "(5,)"))
    line = job(toys, "blobs", "model.batch_norm=true", f"memory.batch_norm={mode}", *STEPS)
    line += ("memory.plan=false",)
    assert expt(*line, "hydra.run.dir=whole", small=False)[0] == 0
    code, out, err = expt(*line, "model._target_=lacking.Net", "hydra.run.dir=run", small=False)
    assert code == 0, err
    result, expected = load_result(home / "run"), load_result(home / "whole")
    (event,) = result.oom_events
    assert (event["rung"], event["exact"]) == ("halve_micro_batch", exact)
    assert event["samples_per_statistic"] == (None if exact else 4)
    assert ("batch normalisation is now over 4 samples" in out) is not exact
    same = result.metrics["test/loss"] == pytest.approx(expected.metrics["test/loss"], rel=1e-4)
    assert same is exact
    cut = ("memory.gradient_accumulation=2", "hydra.run.dir=cut")
    code, out, _ = expt(*line, *cut, small=False)
    assert ("normalises over the batch in 1 layer" in out) is not exact


def test_data_of_the_earlier_protocol_are_told_what_to_change(expt, toys, home) -> None:
    (home / "earlier.py").write_text(
        "class Old:\n"
        "    monitor = 'mae'\n"
        "    def __init__(self, batch_size=2, eval_batch_size=2): ...\n"
        "    def gather(self, split, indices): ...\n"
        "    def metrics(self): ...\n"
    )
    code, _, err = expt(*job(toys, "blobs", "data._target_=earlier.Old"), small=False)
    assert code == 2
    assert "rename its method metrics() to accumulator()" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("loader.pin_memory=true",), "cannot pin"),
        (("loader.num_workers=1000",), "more than the"),
        (("loader.num_workers=-1",), "loader.num_workers must be at least 0"),
        (("loader.on_bad_sample=ignore",), "on_bad_sample"),
        (("loader.workers=2",), "num_workers"),
    ],
)
def test_settings_of_the_loader_that_make_no_sense_are_refused(
    expt, toys, settings: tuple[str, ...], words: str
) -> None:
    code, _, err = expt(*job(toys, "blobs"), *settings, small=False)
    assert code == 2
    assert words in err


def test_a_sample_that_cannot_be_read_ends_the_run_with_its_name(expt, toys, clips, home) -> None:
    from clips import write_clips

    (clips / "train_007_1.npy").write_bytes(b"no clip")
    line = job(toys, "clips", "trainer.epochs=1")
    code, _, err = expt(*line, "hydra.run.dir=run", small=False)
    assert code == 2
    assert "train_007_1.npy cannot be read" in err
    code, _, err = expt(*line, "hydra.run.dir=skipping", "loader.on_bad_sample=skip", small=False)
    assert code == 0, err
    assert load_result(home / "skipping").skipped_samples == 1
    # Nothing is lost by it: with the file mended, the run goes on from the step it ended at.
    write_clips(home / "again")
    (clips / "train_007_1.npy").write_bytes((home / "again/train_007_1.npy").read_bytes())
    code, _, err = expt(*line, "hydra.run.dir=run", "trainer.resume=true", small=False)
    assert code == 0, err
    assert expt(*line, "hydra.run.dir=whole", small=False)[0] == 0
    result, whole = load_result(home / "run"), load_result(home / "whole")
    assert result.resumed_from_step > 0
    assert result.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("name", JOBS)
def test_the_best_weights_predict_and_are_exported(expt, toys, clips, home, name) -> None:
    import numpy as np
    import torch

    line = job(toys, name, "trainer.epochs=2", "hydra.run.dir=run", "memory.plan=false")
    code, _, err = expt(*line, "trainer.save_predictions=true", small=False)
    assert code == 0, err
    code, _, err = expt("task=predict", "predict.run=run", "hydra.run.dir=new", small=False)
    assert code == 0, err
    record = json.loads((home / "new/predict.json").read_text())
    tested = load_result(home / "run").metrics
    assert record["metrics"] == {key: tested[f"test/{key}"] for key in ("accuracy", "loss")}
    kept, new = (np.load(home / run / "predictions/test.npz") for run in ("run", "new"))
    assert kept["predictions"].shape == (record["samples"], 3)
    np.testing.assert_array_equal(kept["predictions"], new["predictions"])
    assert new["indices"].tolist() == list(range(record["samples"]))
    code, _, err = expt("task=export", "export.run=run", "hydra.run.dir=program", small=False)
    assert code == 0, err
    record = json.loads((home / "program/export.json").read_text())
    assert record["difference"] <= 1e-5 and record["any_batch_size"]
    import expt as package

    model, transforms = package.load("run")
    assert transforms is None
    program = torch.export.load(str(home / "program/model.pt2")).module()
    x = torch.randn(4, *record["inputs"]["x"][1][1:])
    torch.testing.assert_close(program(x=x), model(x=x), rtol=1e-5, atol=1e-5)
    code, _, err = expt("task=predict", "predict.run=run", "predict.format=parquet", small=False)
    assert code == 2 and "does not write it" in err


@pytest.mark.parametrize("name", JOBS)
def test_a_finished_run_that_is_extended_is_the_longer_run(expt, toys, clips, home, name) -> None:
    line = job(toys, name, "trainer.steps_per_epoch=4", "model.dropout=0.2", "memory.plan=false")
    assert expt(*line, "trainer.epochs=5", "hydra.run.dir=whole", small=False)[0] == 0
    assert expt(*line, "trainer.epochs=2", "hydra.run.dir=run", small=False)[0] == 0
    code, out, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert "already completed" in out and "trainer.epochs=2 is what it has done" in out
    code, out, err = expt("trainer.resume=run", "trainer.epochs=5", small=False)
    assert code == 0, err
    assert "12 steps more than the run had; the schedule constant stays" in out
    result, whole = load_result(home / "run"), load_result(home / "whole")
    assert (result.epochs, result.steps, result.resumed_from_step) == (5, 20, 8)
    assert result.weights_sha256 == whole.weights_sha256
    assert result.metrics == whole.metrics
    history = json.loads((home / "run/history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    # It is a run of five epochs from now on.
    code, out, err = expt("trainer.resume=run", small=False)
    assert code == 0 and "trainer.epochs=5 is what it has done" in out


HOOKS = """
import json
from pathlib import Path


class Notes:
    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def note(self, *what):
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def run_start(self, trainer):
        self.note("run_start", trainer.progress.step)

    def evaluation_end(self, trainer, split, figures):
        self.note("evaluation_end", split, sorted(figures))

    def epoch_end(self, trainer, row):
        saved = (trainer.run_dir / "checkpoints/last.pt").exists()
        self.note("epoch_end", row["epoch"], row["val"], saved)

    def out_of_memory(self, event):
        self.note("out_of_memory", event["step"], event["rung"])

    def run_end(self, result):
        self.note("run_end", result.status, (result.run_dir / "result.json").exists())


class Failing:
    def epoch_end(self, trainer, row):
        raise RuntimeError("a hook's own fault")


class Misspelt:
    def on_epoch_end(self, trainer, row): ...
"""


@pytest.mark.parametrize("name", JOBS)
def test_hooks_are_called_at_five_moments(expt, toys, clips, home, name) -> None:
    (home / "hooks.py").write_text(HOOKS)
    (home / "lacking.py").write_text(OOM_MODEL.replace("(5, 12)", "(5,)"))
    line = job(toys, name, "trainer.epochs=2", "trainer.steps_per_epoch=4", "memory.plan=false")
    line += ("model._target_=lacking.Net", "callbacks=[{_target_: hooks.Notes, path: notes}]")
    code, _, err = expt(*line, "hydra.run.dir=run", small=False)
    assert code == 0, err
    history = json.loads((home / "run/history.json").read_text())
    figures = ["accuracy", "loss"]
    assert [json.loads(line) for line in (home / "notes").read_text().splitlines()] == [
        ["run_start", 0],
        ["evaluation_end", "val", figures],
        ["epoch_end", 1.0, history[0]["val"], True],
        ["out_of_memory", 4, "halve_micro_batch"],
        ["evaluation_end", "val", figures],
        ["epoch_end", 2.0, history[1]["val"], True],
        ["evaluation_end", "test", figures],
        ["run_end", "completed", True],
    ]


def test_hooks_that_cannot_work_are_refused_and_their_faults_end_the_run(expt, toys, home) -> None:
    (home / "hooks.py").write_text(HOOKS)
    line = job(toys, "blobs", "trainer.epochs=2", "hydra.run.dir=run", "memory.plan=false")
    for node, words in {
        "{_target_: hooks.Misspelt}": "none of the methods that are called: run_start",
        "{_target_: hooks.Notes}": "callbacks.0.path is required",
        "{_target_: hooks.Notes, pth: x}": "callbacks.0.pth: hooks.Notes has no such argument",
        "{_target_: hooks.Note}": "has no class 'Note'",
        "print": "callbacks.0 must be a class",
    }.items():
        code, _, err = expt(*line, f"callbacks=[{node}]", small=False)
        assert code == 2 and words in err, err
        assert not (home / "run").exists()
    with pytest.raises(RuntimeError, match="a hook's own fault"):
        expt(
            *line, "callbacks=[{_target_: hooks.Failing},{_target_: hooks.Notes, path: notes}]",
            small=False,
        )  # fmt: skip
    assert load_result(home / "run").stop_reason == "RuntimeError: a hook's own fault"
    assert json.loads((home / "notes").read_text().splitlines()[-1]) == ["run_end", "failed", True]


@pytest.mark.parametrize("name", JOBS)
def test_csv_and_tensorboard_have_what_mlflow_has_also_after_a_resume(
    expt, toys, clips, home, name
) -> None:
    import csv

    from tensorboardX.proto.event_pb2 import Event

    line = job(toys, name, "trainer.steps_per_epoch=4", "memory.plan=false")
    line += ("trainer.log_every_steps=2", "tracking.loggers=[csv,tensorboard]")
    assert expt(*line, "trainer.epochs=2", "hydra.run.dir=run", small=False)[0] == 0
    code, _, err = expt("trainer.resume=run", "trainer.epochs=3", small=False)
    assert code == 0, err
    with (home / "run/csv/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(int(row["step"]), float(v)) for row in rows if (v := row["val/accuracy"])]
    history = json.loads((home / "run/history.json").read_text())
    assert {step for step, _ in found} == {4, 8, 12}
    assert {(int(row["step"]), row["val"]) for row in history} <= set(found)
    assert len({(row["step"], key) for row in rows for key, v in row.items() if v}) == sum(
        1 for row in rows for v in row.values() if v
    ) - (len(rows) - len({row["step"] for row in rows}))
    values = {}
    for path in sorted((home / "run/tensorboard").glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            at += 12 + size + 4
    for row in history:
        assert values["val/accuracy", int(row["step"])] == pytest.approx(row["val"])
    code, _, err = expt(*line, "tracking.loggers=[mlfow]", small=False)
    assert code == 2 and "tracking.loggers: there is no 'mlfow'; did you mean 'mlflow'?" in err
