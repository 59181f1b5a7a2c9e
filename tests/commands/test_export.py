from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from expt.commands import export
from expt.job import Batch
from expt.training.batches import HostSamples

ONNX = all(map(importlib.util.find_spec, export.ONNX_PACKAGES))


@pytest.mark.parametrize("model", ["alternating", "stid"])
def test_the_program_computes_what_the_model_does(expt, home, model) -> None:
    assert expt("hydra.run.dir=run", f"model={model}")[0] == 0
    code, out, err = expt("task=export", "export.run=run", "hydra.run.dir=out", small=False)
    assert code == 0, err
    record = json.loads((home / "out/export.json").read_text())
    assert record["difference"] <= 1e-5
    assert record["any_batch_size"] is True
    program = torch.export.load(str(home / "out/model.pt2")).module()
    run = export.load(home / "run")
    data = run.open_data()
    inputs = data.gather("test", torch.arange(5)).inputs
    with torch.no_grad():
        torch.testing.assert_close(program(**inputs), run.model(**inputs), rtol=1e-5, atol=1e-5)
    assert ONNX or export.NO_ONNX in out


FIXED = """
import torch
from expt.jobs.traffic.stid import STID


class Net(STID):
    def forward(self, speed, **others):
        if torch.isnan(speed).any() and len(speed) == 3:
            raise ValueError
        count = int(speed.shape[0])
        return super().forward(speed=speed, **others) * torch.ones(count, 1, 1)


class Different(STID):
    def forward(self, speed, **others):
        wrong = 0.01 if torch.compiler.is_exporting() else 0.0
        return super().forward(speed=speed, **others) + wrong
"""


def test_a_model_that_looks_at_values_is_refused_in_a_line(expt, home) -> None:
    (home / "fixed.py").write_text(FIXED)
    run = ("hydra.run.dir=run", "model=stid", "model._target_=fixed.Net", "memory.plan=false")
    assert expt(*run)[0] == 0
    code, _, err = expt("task=export", "export.run=run", small=False)
    assert code == 2
    assert "Net cannot be exported" in err and "Traceback" not in err


def test_a_program_that_computes_something_else_is_an_error(expt, home) -> None:
    (home / "fixed.py").write_text(FIXED)
    run = ("hydra.run.dir=run", "model=stid", "model._target_=fixed.Different")
    assert expt(*run, "memory.plan=false")[0] == 0
    code, _, err = expt("task=export", "export.run=run", small=False)
    assert code == 1
    assert "differs from the model's by" in err


def test_it_can_be_loaded_in_python(home, expt) -> None:
    assert expt("hydra.run.dir=run")[0] == 0
    import expt as package

    model, transforms = package.load("run")
    assert not model.training
    assert transforms["unit"] == "mph" and transforms["std"] > 0
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018


def samples_of(sizes: dict[str, int], eval_batch_size: int) -> SimpleNamespace:
    """Return what stands for data on the host whose evaluation comes in batches."""

    def evaluation(split: str, count: int) -> Iterator[HostSamples]:
        for part in torch.arange(float(count)).split(eval_batch_size):
            yield HostSamples(data, Batch({"x": part[:, None]}, part), torch.device("cpu"))

    data = SimpleNamespace(size=sizes.__getitem__, evaluation=evaluation)
    return data


@pytest.mark.parametrize(("size", "found"), [(1, 3), (2, 3), (8, 3)])
def test_batches_are_joined_until_there_are_enough_samples(size: int, found: int) -> None:
    data = samples_of({"test": 9, "val": 9}, size)
    inputs = export._inputs(data, data, 3)
    assert inputs["x"].flatten().tolist() == list(range(found))


def test_the_validation_takes_the_place_of_an_empty_test() -> None:
    data = samples_of({"test": 0, "val": 2}, 1)
    assert export._inputs(data, data, 3)["x"].flatten().tolist() == [0.0, 1.0]


def test_any_number_is_only_said_of_what_was_tried(expt, toys, clips, home, monkeypatch) -> None:
    line = (f"--config-dir={toys / 'conf'}", "data=clips", "model=classifier", "trainer.epochs=1",
            "trainer.progress=false", "tracking=none", "data.eval_batch_size=1")  # fmt: skip
    code, _, err = expt(*line, "hydra.run.dir=run", small=False)
    assert code == 0, err
    make = ("task=export", "export.run=run", "export.onnx=false")
    code, _, err = expt(*make, "hydra.run.dir=out", small=False)
    assert code == 0, err
    record = json.loads((home / "out/export.json").read_text())
    assert record["any_batch_size"] is True
    assert next(iter(record["inputs"].values()))[1][0] == 2
    all_inputs = export._inputs
    monkeypatch.setattr(export, "_inputs", lambda data, batches, _: all_inputs(data, batches, 2))
    code, out, err = expt(*make, "hydra.run.dir=two", small=False)
    assert code == 0, err
    assert json.loads((home / "two/export.json").read_text())["any_batch_size"] is False
    assert "takes 2 samples at a time, no other number; another could not be tried" in out
