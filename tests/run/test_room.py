"""Whole runs inside a budget, without recovery, and with a smaller run to fall back on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expt.config.schema import MemoryConfig, Precision, Preset
from expt.result import load_result
from expt.run.guard import advice

MODEL = """
import torch
from expt.jobs.traffic.{module} import {name}


class Net({name}):
    calls = 0

    def forward(self, **inputs):
        Net.calls += 1
        weights = sum(weight.numel() for weight in self.parameters())
        if torch.is_grad_enabled() and {lacking}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().forward(**inputs)
"""


def lacking(home: Path, file: str, when: str, name: str = "STID") -> tuple[str, ...]:
    """Return the settings of a model that runs out of memory in training `when`."""
    module = name.lower()
    (home / f"{file}.py").write_text(MODEL.format(lacking=when, module=module, name=name))
    return (f"model={module}", f"model._target_={file}.Net", "hydra.run.dir=run")


def test_a_run_stays_inside_its_budget_and_ends_like_the_free_one(expt, home):
    settings = ("data.batch_size=16", "model.dropout=0", "model.embed_dim=16", "trainer.epochs=1")
    assert expt(*settings, "hydra.run.dir=free")[0] == 0
    free = load_result(home / "free")
    limit = int(0.6 * free.memory["peak_allocated_bytes"])
    # Without the prediction, which would have it adapted or refused beforehand.
    budget = (f"memory.budget={limit}", "memory.plan=false")
    code, out, err = expt(*settings, *budget, "hydra.run.dir=run")
    assert code == 0, err
    result = load_result(home / "run")
    assert result.memory["budget_bytes"] == limit
    assert 0.3 * limit < result.memory["peak_allocated_bytes"] <= limit
    assert "enforces the budget" in result.memory["meter"]
    assert free.memory["budget_bytes"] is None
    assert result.metrics == pytest.approx(free.metrics, rel=1e-3)
    assert result.oom_events
    assert out.count("out of memory") == len(result.oom_events)
    assert json.loads((home / "run/oom_events.json").read_text()) == result.oom_events
    assert {event["budget_bytes"] for event in result.oom_events} == {limit}
    assert result.oom_events[0]["rung"] == "halve_micro_batch"


def test_without_recovery_a_lack_of_memory_is_exit_1_without_a_traceback(expt, home):
    settings = lacking(home, "lab_once", "Net.calls == 8")  # six steps, with a validation
    more = ("memory.plan=false", "memory.recover=false", "trainer.checkpoint_every_steps=2")
    code, out, err = expt(*settings, *more)
    assert code == 1
    assert "Traceback" not in err
    assert "memory.recover=false" in out
    result = load_result(home / "run")
    assert (result.status, result.stop_reason, result.steps) == ("failed", "out_of_memory", 5)
    assert [event["step"] for event in result.oom_events] == [5]
    code, out, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert "at step 4" in out
    result = load_result(home / "run")
    assert result.status == "completed"
    assert [event["step"] for event in result.oom_events] == [5], "what was before is kept"


def test_when_nothing_is_left_the_run_says_what_was_tried_and_what_would_help(expt, home):
    code, out, err = expt(*lacking(home, "lab_always", "True"))
    assert code == 1
    assert "Traceback" not in err
    for words in ("nothing is left to try", "single sample", "What would help", "memory=minimal"):
        assert words in out
    result = load_result(home / "run")
    assert (result.status, result.stop_reason) == ("failed", "out_of_memory")
    assert result.fallback_run is None
    assert (home / "run/checkpoints/last.pt").exists()


@pytest.mark.parametrize(
    ("memory", "takes_over", "device", "words"),
    [
        (
            MemoryConfig(preset=Preset.full, budget="1GiB"),
            None,
            "cpu",
            "a smaller preset (memory=lite or memory=minimal), or memory.fallback=preset to have "
            "it tried, a higher memory.budget, memory.precision=bf16, or another device",
        ),
        (
            MemoryConfig(
                preset=Preset.minimal,
                fallback="preset",
                fallback_settings=["+memory=lite"],
                budget="5MiB",
            ),
            "phase1",
            "cpu",
            "a higher memory.budget, memory.precision=bf16, or another device",
        ),
        (
            MemoryConfig(preset=Preset.minimal, precision=Precision.bf16),
            None,
            "cpu",
            "a smaller model than memory=minimal, or another device",
        ),
        (
            MemoryConfig(
                preset=Preset.minimal, fallback="preset", fallback_settings=["+memory=lite"]
            ),
            "phase1",
            "cuda",
            "another device",
        ),  # auto is bf16
    ],
)
def test_advice_names_nothing_that_is_in_force(memory, takes_over, device, words):
    assert advice(memory, takes_over, device) == f"What would help: {words}"


def test_smaller_runs_take_over_and_each_record_says_where_the_other_is(expt, home):
    from mlflow import MlflowClient

    settings = lacking(home, "lab_wide", "weights > 1_000_000", "Alternating")
    more = ("memory=full", "memory.fallback=preset", "trainer.epochs=1", "tracking=mlflow")
    settings += ("memory.plan=false",)  # the ladder without its predictions, which take long
    settings += ("trainer.steps_per_epoch=2", "trainer.eval_batches=1")
    code, out, err = expt(*settings, *more)
    assert code == 0, err
    assert "lite takes over" in out
    first, second = load_result(home / "run"), load_result(home / "run-lite")
    assert (first.status, first.stop_reason) == ("failed", "out_of_memory")
    assert Path(first.fallback_run) == home / "run-lite"
    assert (second.status, second.preset, second.fallback_run) == ("completed", "lite", None)
    launch = json.loads((home / "run-lite/launch.json").read_text())
    assert {"+memory=lite", "memory.fallback=preset"} <= set(launch["overrides"])
    client = MlflowClient(first.tracking["uri"])
    one, other = (client.get_run(result.tracking["run_id"]) for result in (first, second))
    assert one.info.status == "FAILED"
    assert one.data.tags["fallback_run"] == str(home / "run-lite")
    assert other.data.tags["fallback_of"] == str(home / "run")
    assert other.data.tags["fallback_of_run_id"] == one.info.run_id
    assert one.data.metrics["memory/oom_events"] == len(first.oom_events) > 3
    assert one.data.tags["oom_rung"] == "none"
    names = {file.path for file in client.list_artifacts(one.info.run_id)}
    assert "oom_events.json" in names


def test_after_minimal_comes_the_model_phase1(expt, home):
    settings = lacking(home, "lab_large", "True")
    code, _, err = expt(
        *settings, "model.dropout=0.2", "memory.fallback=preset", "memory.plan=false",
        "trainer.epochs=1", "trainer.eval_batches=1",
    )  # fmt: skip
    assert code == 0, err
    assert Path(load_result(home / "run").fallback_run) == home / "run-phase1"
    assert load_result(home / "run-phase1").status == "completed"
    config = (home / "run-phase1/config.yaml").read_text()
    assert "expt.jobs.traffic.phase1.Phase1" in config
    assert "dropout: 0.1" in config, "settings of one model are not another's"
