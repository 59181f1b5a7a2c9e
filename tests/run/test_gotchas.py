"""Each of the handbook's gotchas is told on a case built for it, and presets hear of none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expt.commands import plan
from expt.config.settings import RunContext
from expt.config.validate import validated
from expt.memory.planning.allocator import Requests
from expt.memory.planning.plan import Plan
from expt.run.build import build
from expt.run.gotchas import CHECKS, LEAST, Gotcha, gotchas, odd_sizes
from expt.run.overflow import plan_before
from expt.run.planner import Planner

LAB = """
import torch
from torch import nn
from torch.nn import functional as F
from expt.job import Batch, Metric


class Figures:
    def update(self, prediction, batch):
        self.loss = F.cross_entropy(prediction.float(), batch.target)

    def compute(self):
        return {"loss": float(self.loss)}


class Pictures:
    metrics = [Metric("loss")]

    def __init__(self, pixels: int, large: int, batch_size: int, eval_batch_size: int):
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.sizes = [(pixels, pixels)] * 15 + [(large, large)]

    def size(self, split):
        return len(self.sizes)

    def model_arguments(self):
        return {}

    def item(self, split, index, generator):
        return Batch({"images": torch.zeros(3, *self.sizes[index])}, torch.tensor(0))

    def example(self, split, count):
        shape = (count, 3, *max(self.sizes))
        return Batch({"images": torch.zeros(shape)}, torch.zeros(count, dtype=torch.int64))

    def loss(self, prediction, batch):
        return F.cross_entropy(prediction.float(), batch.target, reduction="sum")

    def accumulator(self):
        return Figures()

    def fingerprint(self):
        return "pictures"


class Net(nn.Module):
    def __init__(self, kind: str, weights: int):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.many = nn.Linear(weights, weights, bias=False)
        self.last = nn.Linear(4, 3)

    def forward(self, images):
        if self.kind == "apart":
            images = torch.stack([image for image in images])
        if self.kind == "moved":
            images = torch.cat([image[None].to(torch.float64).float() for image in images])
        x = self.first(images).relu().flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = x.mean(dim=1)
        return self.last(x) + self.many.weight.mean()
"""


@pytest.fixture
def lab(home: Path, monkeypatch, composed):
    """Return a function that composes a run of the job above."""
    (home / "lab_gotchas.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(home))

    def make(*overrides: str, weights: int = 8, kind: str = "plain", large: int = 64):
        return composed(
            "data._target_=lab_gotchas.Pictures", "model._target_=lab_gotchas.Net",
            "+data.pixels=64", f"+data.large={large}", "data.batch_size=8",
            "data.eval_batch_size=4", f"+model.kind={kind}", f"+model.weights={weights}",
            "memory.precision=fp32", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture
def told(lab):
    """Return a function that gives the gotchas of a run by name, and its plan."""

    def found(*overrides: str, **sizes):
        settings = validated(lab(*overrides, **sizes), {"data._target_", "model._target_"})
        planner = Planner(settings, build(settings, "data"), "cuda")
        return {gotcha.name: gotcha for gotcha in gotchas(planner)}, planner.plan()

    return found


def test_checkpointing_a_tiny_model_is_told_with_what_it_costs(told) -> None:
    line = ("memory.activation_checkpointing=true", "optimizer=adamw_foreach")
    found, planned = told(*line, weights=2000)
    assert planned.phase == "optimizer_step"
    gotcha = found["tiny_checkpointing"]
    assert gotcha.bytes < LEAST * planned.peak_bytes
    assert gotcha.share > LEAST
    assert gotcha.change == "memory.activation_checkpointing=false"
    assert "tiny_checkpointing" not in told(line[0])[0], "where it saves something"


def test_state_and_copies_of_weights_are_told_where_they_are_the_peak(told) -> None:
    found, planned = told("optimizer=adamw_foreach", weights=2000)
    copies, state = found["foreach_step"], found["forgotten_state"]
    assert copies.bytes == pytest.approx(16e6, rel=0.05), "of the weights once"
    assert copies.change == "+optimizer.fused=true optimizer.foreach=null"
    assert state.change == "optimizer=adafactor"
    assert LEAST * planned.peak_bytes < state.bytes < planned.by_category["optimizer_state"] * 1.6
    fused, _ = told("optimizer=adamw", weights=2000)
    assert set(fused) == {"forgotten_state"}
    assert not told()[0]


def test_one_large_image_is_told_with_the_bytes_it_costs(told) -> None:
    found, planned = told(large=256)
    gotcha = found["large_image"]
    _, usual = told()
    assert gotcha.bytes == planned.peak_bytes - usual.peak_bytes > 0.5 * planned.peak_bytes
    assert "256x256" in gotcha.words and "64x64" in gotcha.words
    assert "large_image" not in told(large=70)[0]


@pytest.mark.parametrize("kind", ["apart", "moved"])
def test_a_batch_that_is_copied_image_by_image_is_told(told, kind) -> None:
    found, _ = told(kind=kind)
    gotcha = found["per_image_copies"]
    assert gotcha.bytes >= 8 * 3 * 64 * 64 * 4
    assert f"{8 if kind == 'apart' else 24} copies" in gotcha.words


def test_processes_that_all_hold_the_model_are_told(told) -> None:
    found, _ = told("trainer.devices=2", weights=2000)
    gotcha = found["whole_model_everywhere"]
    assert gotcha.change == "trainer.strategy=fsdp"
    assert gotcha.bytes > 16e6, "more than half of weights, gradients and state of 64 MB"
    assert "whole_model_everywhere" not in told(weights=2000)[0]


def test_a_matrix_of_attention_is_told(composed) -> None:
    settings = validated(composed("+memory=minimal", "memory.attention_kernel=math"))
    found = gotchas(Planner(settings, build(settings, "data"), "cuda"))
    assert [gotcha.change for gotcha in found] == ["memory.attention_kernel=fused"]


def of_requests(changes: list[tuple[int, int]]) -> Plan:
    requests = Requests(tuple(changes), 0)
    reserved = requests.reserved_bytes()
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return Plan(
        "cuda", peak, reserved, (peak, peak), "forward", {}, {}, {}, "trace", 0.0,
        requests=requests,
    )  # fmt: skip


def test_sizes_that_do_not_fit_into_one_another_s_places_are_told() -> None:
    mib = 2**20
    growing, alike = [], []
    for number in range(40):
        for changes, size in ((growing, (30 + number) * mib + 512), (alike, 50 * mib)):
            changes.append((number, size))
            if number:
                changes.append((number - 1, -dict(changes)[number - 1]))
    gotcha = odd_sizes(None, of_requests(growing))  # type: ignore[arg-type]
    assert gotcha is not None
    assert "40 different sizes" in gotcha.words
    assert "expandable_segments" in gotcha.change
    assert odd_sizes(None, of_requests(alike)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["minimal"])
def test_presets_hear_of_none(composed, preset) -> None:
    settings = validated(composed(f"+memory={preset}"))
    assert gotchas(Planner(settings, build(settings, "data"), "cuda")) == []


def test_a_check_that_fails_hides_no_other(told, monkeypatch) -> None:
    def broken(planner: Planner, planned: Plan) -> Gotcha | None:
        raise RuntimeError("a model that cannot do this")

    monkeypatch.setattr("expt.run.gotchas.CHECKS", (broken, *CHECKS))
    assert "forgotten_state" in told(weights=2000)[0]


def test_they_are_told_by_a_plan_and_before_a_run(lab, home, capsys) -> None:
    cfg = lab("optimizer=adamw", "task=plan", "tracking=none", "memory.target=cuda", weights=2000)
    overridden = frozenset({"data._target_", "model._target_"})
    record = plan.run(cfg, RunContext(home, overridden=overridden)).record
    assert [gotcha["name"] for gotcha in record["gotchas"]] == ["forgotten_state"]
    assert json.loads((home / "plan.json").read_text())["gotchas"] == record["gotchas"]
    assert "gotcha: the optimizer's state takes" in capsys.readouterr().out
    settings = validated(cfg, overridden)
    plan_before(settings, build(settings, "data"), "cpu", None)
    assert "gotcha: the optimizer's state takes" in capsys.readouterr().out
