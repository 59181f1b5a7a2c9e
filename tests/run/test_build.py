"""Frozen weights, groups with their own rates, pretrained weights, presets' other settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from expt.config.schema import MemoryConfig, TrackingConfig, TrainerConfig
from expt.config.settings import RunContext, Settings
from expt.result import load_result
from expt.run.fallback import next_smaller

MODEL = """
import os
import torch
from torch import nn
from expt.job import Grouped


class Net(nn.Module):
    calls = 0

    def __init__(self, num_inputs, num_classes, width=16):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(num_inputs, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = nn.Linear(64, num_classes)
        for weight in self.backbone.parameters():
            nn.init.constant_(weight, float(os.environ.get("LAB_WEIGHT", "0.1")))

    def forward(self, x):
        Net.calls += self.training
        if self.training and Net.calls == int(os.environ.get("LAB_FAIL_AT", "0")):
            raise RuntimeError("a fault of mine")
        return self.head(self.backbone(x))


class Grouped(Net):
    def parameter_groups(self):
        return {"backbone": self.backbone.parameters(), "head": self.head.parameters()}


class Pretrained(Net):
    def load_pretrained(self):
        if next(self.parameters()).is_meta or type(self.head.weight.data) is not torch.Tensor:
            raise AssertionError("a plan reads no weights")
        nn.init.constant_(self.head.weight, 0.25)
        print("pretrained weights read")
        return "the body is made up"
"""


@pytest.fixture
def line(toys: Path, home: Path) -> tuple[str, ...]:
    """A run of the classifier above on the toy points."""
    (home / "lab_build.py").write_text(MODEL)
    return (
        f"--config-dir={toys / 'conf'}", "data=blobs", "model=classifier", "tracking=none",
        "model._target_=lab_build.Net", "trainer.epochs=2", "trainer.progress=false",
        "hydra.run.dir=run",
    )  # fmt: skip


def stored(home: Path, name: str = "last.pt") -> dict:
    return torch.load(home / "run/checkpoints" / name, weights_only=True)


def test_frozen_weights_are_not_trained_nor_saved_where_they_are_most(expt, line, home) -> None:
    code, _, err = expt(*line, "trainer.trainable=['head.*']", small=False)
    assert code == 0, err
    for name in ("last.pt", "best.pt"):
        assert set(stored(home, name)["model"]) == {"head.weight", "head.bias"}
    assert stored(home)["frozen"]["names"][0] == "backbone.0.bias"
    (group,) = stored(home)["optimizer"]["param_groups"]
    assert len(group["params"]) == 2


def test_weights_that_are_mostly_trained_are_saved_whole(expt, line, home) -> None:
    assert expt(*line, "trainer.trainable=['backbone.*']", small=False)[0] == 0
    assert len(stored(home)["model"]) == 6
    assert stored(home)["frozen"] is None
    assert torch.equal(
        stored(home)["model"]["head.bias"], stored(home, "best.pt")["model"]["head.bias"]
    )


def test_a_run_with_frozen_weights_resumes_and_knows_its_base(
    expt, line, home, monkeypatch
) -> None:
    settings = (*line, "trainer.trainable=['head.*']", "trainer.checkpoint_every_steps=3")
    settings += ("memory.plan=false",)
    assert expt(*settings, "hydra.run.dir=whole", small=False)[0] == 0
    monkeypatch.setenv("LAB_FAIL_AT", "19")
    sys.modules["lab_build"].Net.calls = 0
    with pytest.raises(RuntimeError, match="a fault of mine"):
        expt(*settings, small=False)
    monkeypatch.delenv("LAB_FAIL_AT")
    monkeypatch.setenv("LAB_WEIGHT", "0.2")
    code, _, err = expt(*settings, "trainer.resume=true", small=False)
    assert code == 2
    assert "other frozen weights" in err
    monkeypatch.delenv("LAB_WEIGHT")
    assert expt(*settings, "trainer.resume=true", small=False)[0] == 0
    result, whole = load_result(home / "run"), load_result(home / "whole")
    assert result.resumed_from_step == 18
    assert result.weights_sha256 == whole.weights_sha256


def with_groups(home: Path, groups: str, conf: Path) -> tuple[str, ...]:
    """Write an optimizer with groups beside the toys' YAML; return the settings that choose it."""
    for name in ("data/blobs", "model/classifier"):
        (home / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"conf/{name}.yaml").write_text((conf / f"{name}.yaml").read_text())
    (home / "conf/optimizer").mkdir()
    text = f"defaults: [adamw, _self_]\ngroups: {groups}\n"
    (home / "conf/optimizer/grouped.yaml").write_text(text)
    return ("--config-dir=conf", "optimizer=grouped")


@pytest.mark.parametrize(
    ("target", "groups"),
    [("Net", "{'backbone.*': {lr: 1.0e-5}}"), ("Grouped", "{backbone: {lr: 1.0e-5}}")],
)
def test_groups_have_their_own_rates(expt, line, toys, home, target, groups) -> None:
    more = (f"model._target_=lab_build.{target}", *with_groups(home, groups, toys / "conf"))
    line = line[1:]
    code, _, err = expt(*line, *more, "optimizer.lr=1e-3", "trainer.schedule=constant", small=False)
    assert code == 0, err
    rates = [group["lr"] for group in stored(home)["optimizer"]["param_groups"]]
    assert rates == [1e-5, 1e-3]
    assert load_result(home / "run").memory["predicted_peak_bytes"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("trainer.trainable=['heads.*']",), "matches no weight of Net"),
        (("trainer.trainable=[]",), "matches no weight"),
        (("+optimizer.groups={tail: {lr: 1}}",), "optimizer.groups.tail"),
        (("+optimizer.groups={head: 1e-5}",), "optimizer.groups must map"),
        (("model._target_=lab_build.Grouped", "+optimizer.groups={head: {rate: 1}}"), "head.rate"),
        (("model._target_=lab_build.Grouped", "+optimizer.groups={head: {lr: -3}}"), "groups.head"),
        (("memory.fallback=['model=nosuch']",), "model=nosuch cannot be composed"),
        (("memory.fallback=smaller",), "memory.fallback='smaller'"),
        (("memory.fallback=[lite]",), "'lite' is no setting"),
    ],
)
def test_what_names_nothing_is_refused(expt, line, home, more, words) -> None:
    code, _, err = expt(*line, *more, small=False)
    assert code == 2
    assert words in err
    assert not (home / "run").exists()


def test_pretrained_weights_are_read_for_training_and_not_for_a_plan(expt, line) -> None:
    settings = (*line, "model._target_=lab_build.Pretrained")
    code, out, err = expt(*settings, "task=plan", "memory.target=cpu", small=False)
    assert code == 0, err
    assert "weights read" not in out
    code, out, err = expt(*settings, small=False)
    assert code == 0, err
    assert out.count("pretrained weights read") == 1
    assert "note: the body is made up" in out


def test_a_preset_may_set_other_settings_by_rows_of_an_experiment(expt, toys, home) -> None:
    (home / "conf/experiment").mkdir(parents=True)
    (home / "conf/data").mkdir()
    (home / "conf/model").mkdir()
    for name in ("data/blobs", "model/classifier"):
        (home / f"conf/{name}.yaml").write_text((toys / f"conf/{name}.yaml").read_text())
    (home / "conf/experiment/points.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /data: blobs\n  - override /model: classifier\n"
        "memory:\n"
        "  gradient_accumulation: ${by_preset:{full:1,lite:4,minimal:8}}\n"
        "  fallback_settings: [+memory=lite, data.batch_size=2]\n"
        "trainer: {epochs: 1, progress: false}\n"
    )
    line = ("--config-dir=conf", "experiment=points", "tracking=none", "hydra.run.dir=run")
    assert expt(*line, "+memory=lite", small=False)[0] == 0
    config = (home / "run/config.yaml").read_text()
    assert "gradient_accumulation: 4" in config


def test_a_fallback_is_a_list_of_settings(expt, line, home) -> None:
    (home / "lab_wide.py").write_text(
        "import torch\nfrom lab_build import Net as Base\n"
        "class Net(Base):\n"
        "    def forward(self, x):\n"
        "        if torch.is_grad_enabled() and self.head.in_features and LIMIT():\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 MiB')\n"
        "        return super().forward(x)\n"
        "def LIMIT():\n"
        "    import json, glob\n"
        "    return not glob.glob('run-data.batch_size-4-*/launch.json')\n"
    )
    more = ("model._target_=lab_wide.Net", "memory.plan=false", "data.batch_size=8")
    fallback = "memory.fallback=['data.batch_size=4','data.batch_size=2']"
    code, out, err = expt(*line, *more, fallback, small=False)
    assert code == 0, err
    assert "data.batch_size-4 takes over" in out and "data.batch_size-2 takes over" in out
    launch = json.loads((home / "run-data.batch_size-4-data.batch_size-2/launch.json").read_text())
    assert "data.batch_size=2" in launch["overrides"]
    assert load_result(home / "run-data.batch_size-4-data.batch_size-2").status == "completed"


@pytest.mark.parametrize(
    ("entries", "given", "then"),
    [
        (["data.batch_size=8", "data.batch_size=4"], "data.batch_size=2", None),
        (["data.batch_size=8", "data.batch_size=4"], "data.batch_size=8", "data.batch_size=4"),
        (["data.batch_size=8", "data.batch_size=4"], "trainer.epochs=2", "data.batch_size=8"),
        (["memory=lite", "memory=minimal"], "+memory=full", "memory=minimal"),
    ],
)
def test_a_smaller_run_is_never_a_larger_one(entries, given, then) -> None:
    settings = Settings(TrainerConfig(), MemoryConfig(fallback=entries), TrackingConfig(), {})
    context = RunContext(Path("run"), launch={"overrides": [given]})
    assert next_smaller(settings, context) == then
