"""A data set of one's own whose metric is to be high: search, expansion, report go up with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from expt.config.command_line import run_command
from expt.result import load_result
from expt.run.process import Ended
from expt.search.winner import SweepSummary

TOY = '''
"""Numbers in [-1, 1) are to be told apart by their sign; the model's threshold is a setting."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from expt.job import Batch, Metric


class Right:
    def __init__(self):
        self.right, self.loss, self.count = 0.0, 0.0, 0

    def update(self, prediction, batch):
        self.right = self.right + (prediction.argmax(1) == batch.target).sum()
        self.loss = self.loss + cross_entropy(prediction, batch.target, reduction="sum")
        self.count += len(batch)

    def compute(self):
        return {"accuracy": float(self.right) / self.count, "loss": float(self.loss) / self.count}


class Toy:
    metrics = [Metric("accuracy", goal="max", label="accuracy"), Metric("loss")]

    def __init__(self, batch_size=8, eval_batch_size=16):
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.numbers = (torch.arange(32.0) - 15.5) / 16

    def to(self, device):
        self.numbers = self.numbers.to(device)

    def size(self, split):
        return len(self.numbers)

    def gather(self, split, indices):
        chosen = self.numbers[indices].unsqueeze(1)
        return Batch({"numbers": chosen}, (chosen[:, 0] > 0).long())

    def weight(self, split, indices):
        return torch.tensor(float(len(indices)), device=indices.device)

    def model_arguments(self):
        return {}

    def loss(self, prediction, batch):
        return cross_entropy(prediction, batch.target, reduction="sum")

    def accumulator(self):
        return Right()

    def fingerprint(self):
        return "toy"


class Threshold(nn.Module):
    def __init__(self, at=0.0):
        super().__init__()
        self.at = at
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, numbers):
        logit = self.slope * (numbers - self.at)
        return torch.cat([-logit, logit], dim=1)
'''
LINES = ("data=toy", "model=toy", "optimizer=sgd", "optimizer.lr=1e-6", "trainer.device=cpu",
         "trainer.epochs=1", "trainer.progress=false", "tracking=none")  # fmt: skip
RIGHT = {0.8: 0.59375, 0.0: 1.0, 0.4: 0.8125}
"""Accuracy by the model's threshold: what lies between it and zero is wrong."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a data set and a model, and a search of it."""
    home = tmp_path_factory.mktemp("lab")
    (home / "toy.py").write_text(TOY)
    for group, name in (("data", "Toy"), ("model", "Threshold")):
        (home / f"conf/{group}").mkdir(parents=True)
        (home / f"conf/{group}/toy.yaml").write_text(f"_target_: toy.{name}\n")
    (home / "conf/model/toy.yaml").write_text("_target_: toy.Threshold\nat: 0.8\n")
    (home / "conf/search").mkdir()
    (home / "conf/search/toy.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /hydra/sweeper: expt\n"
        "  - override /hydra/sweeper/sampler: grid\n"
        "search:\n"
        "  study: toy\n"
        "  space:\n"
        "    model.at: choice(0.8,0.0,0.4)\n"
    )
    before = os.getcwd()
    os.chdir(home)
    try:
        code = run_command(["-m", "--config-dir=conf", "search=toy", *LINES])
    finally:
        os.chdir(before)
    assert code == 0
    return home


@pytest.fixture
def here(lab, monkeypatch):
    monkeypatch.chdir(lab)
    return lab


def test_a_search_recommends_the_trial_with_the_highest_figure(here) -> None:
    folder = here / "outputs/sweeps/toy"
    summary = SweepSummary.load(folder)
    assert summary.finished == 3
    assert summary.best["params"] == {"model.at": 0.0}
    assert summary.best["val/accuracy"] == summary.best["test/accuracy"] == 1.0
    assert (summary.metric["name"], summary.metric["goal"]) == ("accuracy", "max")
    values = {
        one.parent.name: load_result(one.parent).value()
        for one in folder.glob("trial_*/result.json")
    }
    assert sorted(values.values()) == sorted(RIGHT.values())
    # Three trials are too few for importances, and nothing was excluded.
    assert {path.stem for path in (folder / "plots").iterdir()} == {"trade_off", "prediction"}
    page = (folder / "report.html").read_text()
    assert "validation accuracy 1.000" in page


def test_started_again_it_says_the_best_in_the_metrics_words(here, expt, capfd) -> None:
    os.chdir(here)
    code, out, err = expt("-m", "--config-dir=conf", "search=toy", *LINES, small=False)
    assert code == 0, err
    assert "best: trial" in out and "val accuracy 1.000, test accuracy 1.000, peak" in out
    code, _, err = expt(
        "-m", "--config-dir=conf", "search=toy", *LINES, "trainer.monitor=loss",
        "search.study=other", "search.objectives=[val/accuracy]", small=False,
    )  # fmt: skip
    assert code == 2
    assert "search.objectives=['val/accuracy']: trials are compared by" in err
    assert "val/loss" in err


def test_an_expansion_keeps_the_step_that_goes_up(here, expt, forked, monkeypatch) -> None:
    os.chdir(here)

    def run_forked(lines: list[str], log: Path, *rest: object) -> Ended:
        """Run a probe; what a process of its own is like, other tests of expansions ask."""
        process = forked.start(*lines)
        code, said = forked.ended(process)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(said)
        return Ended(code, process.seconds)

    monkeypatch.setattr("expt.commands.expand.probe.run_apart", run_forked)
    code, out, err = expt(
        "--config-dir=conf", "task=expand", *LINES, "hydra.run.dir=expansion",
        "expand.steps=['model.at=0.9','model.at=0.4']", small=False,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((here / "expansion/expand.json").read_text())
    assert record["metric"] == "val/accuracy"
    assert [step["value"] for step in record["steps"]] == [0.59375, 0.5625, 0.8125]
    assert [step["kept"] for step in record["steps"]] == [True, False, True]
    assert "the validation accuracy is 5.3 % worse than the best" in out
    assert "fits; 36.8 % better" in (here / "expansion/expand.md").read_text()


def test_a_report_ranks_the_highest_first(here, expt) -> None:
    os.chdir(here)
    code, out, err = expt(
        "task=report", "report.runs=outputs/sweeps/toy", "hydra.run.dir=page", "tracking=none",
        small=False,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((here / "page/report.json").read_text())
    assert (record["metric"], record["goal"]) == ("val/accuracy", "max")
    assert record["best"]["value"] == 1.0
    rows = (here / "page/runs.md").read_text().splitlines()
    assert "val accuracy" in rows[0] and "test accuracy" in rows[0]
    assert [next(word for word in row.split("|") if "." in word).strip() for row in rows[2:]] == [
        "1.000", "0.812", "0.594",
    ]  # fmt: skip
    assert "validation accuracy 1.000" in out
    assert "MAE" not in (here / "page/runs.md").read_text() + out
    code, out, _ = expt(
        "task=report", "report.runs=outputs/sweeps/toy", "hydra.run.dir=loss", "tracking=none",
        "report.metric=test/loss", small=False,
    )  # fmt: skip
    assert code == 0
    assert json.loads((here / "loss/report.json").read_text())["goal"] == "min"
