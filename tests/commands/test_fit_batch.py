"""`task=fit_batch`: the largest micro-batch, confirmed by real steps, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expt.commands import fit_batch
from expt.config.validate import validated
from expt.memory.planning.plan import CATEGORIES, Plan
from expt.run.batch_size import fit
from expt.run.build import build
from expt.units import MIB

TINY = ("task=fit_batch", "model=stid", "trainer.device=cpu", "hydra.run.dir=run")
LIMIT = 16 * MIB  # between the peaks of one sample and of 64
BUDGET = f"memory.budget={LIMIT}"


def record(home: Path) -> dict:
    return json.loads((home / "run/fit.json").read_text())


def test_the_batch_is_kept_confirmed_and_trained_with_inside_the_budget(expt, home: Path) -> None:
    code, out, err = expt(*TINY, BUDGET, "data.batch_size=64")
    assert code == 0, err
    found = record(home)
    size, parts = found["micro_batch"], found["gradient_accumulation"]
    assert 1 < size < 64
    assert (found["batch_size"], parts) == (64, -(-64 // size))
    fits = {row["micro_batch"]: row["fits"] for row in found["traced"]}
    assert fits[size] and not fits[size + 1], "one more does not fit"
    assert found["predicted"]["peak_bytes"] <= found["limit_bytes"] == int(0.9 * LIMIT)
    assert found["confirmed"] is True
    assert found["measured_peak_bytes"] == pytest.approx(found["predicted"]["peak_bytes"], rel=0.05)
    assert f"memory.gradient_accumulation={parts}" in found["command"]
    assert "data.batch_size=64" in found["command"]
    assert "task=" not in found["command"]
    assert "limited by memory" in out
    words = found["command"].split()
    assert words[:3] == ["python", "-m", "expt"]
    code, _, err = expt(*words[3:], "hydra.run.dir=trained", small=False)
    assert code == 0, err
    result = json.loads((home / "trained/result.json").read_text())
    assert result["status"] == "completed"
    assert not result["oom_events"]
    assert result["memory"]["peak_allocated_bytes"] <= LIMIT


def made_up(settings, data, target, techniques, *, batch_size=None, features=None) -> Plan:
    """Predict far too little: 8 MiB and 32 KiB a sample, without a trace."""
    peak = 8 * MIB + MIB // 32 * -(-batch_size // techniques.gradient_accumulation)
    categories = dict.fromkeys(CATEGORIES, 0) | {"activations": peak}
    reserved = peak if target == "cuda" else None
    return Plan(
        target, peak, reserved, (peak, peak), "backward", categories, {}, {}, "trace", 0.0
    )  # fmt: skip


def test_steps_that_run_out_of_memory_are_said_to(expt, home: Path, monkeypatch) -> None:
    monkeypatch.setattr("expt.run.batch_size.plan_training", made_up)
    code, out, _ = expt(*TINY, BUDGET, "data.batch_size=64")
    assert code == 0
    assert record(home)["confirmed"] is False
    assert "NOT confirmed" in out


def test_without_the_device_nothing_is_run(expt, home: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("expt.run.batch_size.plan_training", made_up)
    monkeypatch.setattr(fit_batch, "confirm", lambda *_: pytest.fail("a step was taken"))
    code, out, err = expt(*TINY, "memory.target=cuda", "memory.budget=200GiB", "fit.max_batch=32")
    assert code == 0, err
    found = record(home)
    assert (found["target"], found["confirmed"], found["micro_batch"]) == ("cuda", None, 32)
    assert found["limited_by"] == "fit.max_batch"
    assert "no CUDA device here" in out
    assert "room for 32" in out


def test_the_optimizer_in_backward_is_not_accumulated(composed, monkeypatch) -> None:
    monkeypatch.setattr("expt.run.batch_size.plan_training", made_up)
    settings = validated(
        composed(
            "+memory=minimal", "model=stid", "memory.optimizer_in_backward=true",
            "trainer.gradient_clip_norm=null", "data.eval_batch_size=8",
        )
    )  # fmt: skip
    found = fit(settings, build(settings, "data"), "cpu", 9 * MIB, batch_size=64)
    assert found.gradient_accumulation == 1
    assert found.batch_size == found.micro_batch < 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory.budget=20KiB"], ["memory.budget=20KiB", "weights"]),
        (
            ["memory.budget=11MiB"],
            [
                "not even a micro-batch of one",
                "it takes memory.budget=",
                "What would help",
                "a smaller model",
            ],
        ),
        (["memory.target=cuda"], ["memory.budget is not set", "memory.budget=24GiB"]),
        (["memory.target=cuda", "memory.budget=80%"], ["depends on the card"]),
        (["fit.margin=0"], ["fit.margin", "fit.margin=0.9"]),
        (["fit.max_batch=0"], ["fit.max_batch must be at least 1"]),
    ],
)
def test_a_mistake_is_one_clear_message(expt, home: Path, monkeypatch, arguments, words) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = expt(*TINY, *arguments)
    assert code == 2, err
    for word in words:
        assert word in err
    assert not (home / "run").exists()


def test_a_model_that_cannot_be_traced_is_a_message(composed, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr("expt.run.batch_size.plan_training", fail)
    settings = validated(composed("+memory=minimal"))
    with pytest.raises(ValueError, match="cannot be traced: RuntimeError: data-dependent; give"):
        fit(settings, build(settings, "data"), "cpu", 100 * MIB, batch_size=8)


@pytest.mark.parametrize(
    ("now", "eval_batch_size", "more"),
    [(1, 64, 4), (1, 3, 3), (1, 1, None), (4, 64, 8), (4, 4, None), (8, 12, 12)],
)
def test_more_slices_of_evaluation_are_no_more_than_its_samples(
    composed, now, eval_batch_size, more
) -> None:
    assert fit_batch.slices(now, eval_batch_size) == more
    if more is not None:
        sizes = f"data.eval_batch_size={eval_batch_size}"
        validated(composed(sizes, f"memory.forward_chunks={more}"))
