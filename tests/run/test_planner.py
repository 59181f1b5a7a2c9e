"""The plan of a configured training: against the profiler, over the settings, and its advice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from expt.config.schema import Device, Precision, TrainerConfig
from expt.config.settings import Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.memory.planning.predict import Plan
from expt.memory.techniques.techniques import Techniques
from expt.run import savings
from expt.run.build import assemble, build, techniques_of
from expt.run.planner import Planner, plan_training
from expt.run.target import arithmetic, budget_bytes, target_of, target_remark
from expt.training.device import make_fabric

SMALL = ("+memory=minimal", "model=stid", "trainer.device=cpu")
Given = Callable[..., tuple[Settings, Any]]


@pytest.fixture
def given(composed) -> Given:
    """Compose settings, and build their data."""

    def make(*overrides: str) -> tuple[Settings, Any]:
        settings = validated(composed(*overrides))
        return settings, build(settings, "data")

    return make


def peaks(given: Given, *overrides: str, target: str = "cpu") -> Plan:
    return plan_training(*given(*SMALL, *overrides), target)


def profiled(settings: Settings, data: Any) -> int:
    """Return the peak of a real optimizer step, by torch.profiler's allocation events."""
    from torch.profiler import ProfilerActivity, profile

    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    fabric.seed_everything(0, verbose=False)
    model, optimizer = assemble(settings, fabric, data)
    indices = torch.arange(data.batch_size)

    def step() -> None:
        weight = data.weight("train", indices)
        batch = data.gather("train", indices)
        loss = data.loss(model(**batch.inputs), batch) / weight
        fabric.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    live = [vars(data), list(model.parameters()), list(model.buffers())]
    live.append(list(optimizer.state.values()))
    before = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for value in tree_iter(live)
        if isinstance(value, Tensor)
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return sum(before.values()) + max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=alternating",),
        ("model=alternating", "memory.activation_checkpointing=true", "data.batch_size=32"),
        ("model=stid", "optimizer=sgd", "data.batch_size=256"),
        ("model=phase1", "data.batch_size=32"),
    ],
)
def test_our_models_are_predicted_within_one_percent(given: Given, overrides) -> None:
    overrides = ("+memory=minimal", "trainer.device=cpu", "data.eval_batch_size=1", *overrides)
    settings, data = given(*overrides)
    planned = plan_training(settings, data, "cpu")
    peak = profiled(settings, data)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.01)
    assert planned.interval_bytes[0] <= peak <= planned.interval_bytes[1]


def test_evaluation_is_included_with_its_own_batch(given: Given) -> None:
    small, large = (peaks(given, f"data.eval_batch_size={n}") for n in (1, 4096))
    assert small.phase != "evaluation"
    assert large.phase == "evaluation"
    assert large.peak_bytes > small.peak_bytes


def test_settings_go_into_the_plan(given: Given) -> None:
    plain = peaks(given, "data.batch_size=256", "data.eval_batch_size=1")
    base = ("data.batch_size=256", "data.eval_batch_size=1")
    assert peaks(given, *base, "memory.gradient_accumulation=4").peak_bytes < plain.peak_bytes
    weights = plain.by_category["parameters"]
    averaged = peaks(given, *base, "trainer.ema_decay=0.9")
    assert averaged.by_category["parameters"] == pytest.approx(2 * weights, rel=0.01)
    no_clipping = "trainer.gradient_clip_norm=null"
    early = peaks(given, *base, "memory.optimizer_in_backward=true", no_clipping)
    assert early.by_category["gradients"] == 0
    stateless = peaks(
        given, *base, "optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false"
    )
    assert stateless.by_category["optimizer_state"] == 0


def test_the_arguments_take_the_place_of_what_is_configured(given: Given) -> None:
    settings, data = given(*SMALL, "data.batch_size=256", "data.eval_batch_size=1")
    plain = plan_training(settings, data, "cpu").peak_bytes
    four = plan_training(settings, data, "cpu", Techniques(gradient_accumulation=4)).peak_bytes
    assert four < plain
    assert plan_training(settings, data, "cpu", batch_size=64).peak_bytes < plain
    cuda = plan_training(settings, data, "cuda")
    full = plan_training(settings, data, "cuda", precision=Precision.fp32)
    assert cuda.by_category["activations"] < full.by_category["activations"], "bf16 by itself"
    assert data.batch_size == 256


def test_a_technique_that_does_not_apply_is_refused(given: Given) -> None:
    settings, data = given(*SMALL)
    with pytest.raises(ConfigError, match="attention_kernel"):
        plan_training(settings, data, "cpu", Techniques(attention_kernel="fused"))


def test_the_best_savings_come_first_and_are_traced(given: Given) -> None:
    settings, data = given(*SMALL, "data.batch_size=256")
    planned = plan_training(settings, data, "cpu")
    found = savings.savings(Planner(settings, data, planned.target, planned))
    assert 0 < len(found) <= savings.MAX_SAVINGS
    counts = [saving.peak_bytes for saving in found]
    assert counts == sorted(counts)
    assert counts[-1] < planned.peak_bytes
    words, data = given(*SMALL, "data.batch_size=256", found[0].change)
    assert plan_training(words, data, "cpu").peak_bytes == counts[0], "the words do what is said"


def test_advice_leaves_out_what_is_in_force_or_not_possible(given: Given) -> None:
    settings, data = given(
        *SMALL, "data.batch_size=3", "memory.precision=bf16", "memory.forward_chunks=2"
    )
    assert techniques_of(settings.memory).forward_chunks == 2
    changes = [s.change for s in savings.savings(Planner(settings, data, "cpu"))]
    assert not [c for c in changes if "accumulation" in c or "precision" in c or "chunks" in c]


def test_a_fused_optimizer_is_advised_where_its_step_is_the_peak(given: Given) -> None:
    own = (*SMALL, "optimizer=adamw_foreach", "data.batch_size=1", "data.eval_batch_size=1")
    settings, data = given(*own)
    foreach = Planner(settings, data, "cuda")
    assert foreach.plan().phase == "optimizer_step"
    (found,) = [one for one in savings.savings(foreach) if savings.FUSED in one.change]
    followed = plan_training(*given(*own, *found.change.split()), "cuda")
    assert found.peak_bytes == followed.peak_bytes < foreach.plan().peak_bytes
    assert savings.first_that_fits(foreach, found.demand_bytes).change == found.change
    assert found.change.startswith(savings.NO_TECHNIQUES)
    for others in (("optimizer=adamw",), ("data.batch_size=256",)):
        changed = [
            *own[:2],
            *(one for one in own[2:] if one.split("=")[0] != others[0].split("=")[0]),
        ]
        changes = [s.change for s in savings.savings(Planner(*given(*changed, *others), "cuda"))]
        assert not [change for change in changes if savings.FUSED in change]


@pytest.mark.parametrize("eval_batch_size", [1, 3, 64])
def test_slices_of_evaluation_are_advised_as_many_as_there_are_samples(
    given: Given, eval_batch_size: int
) -> None:
    own = (*SMALL, "data.batch_size=1", f"data.eval_batch_size={eval_batch_size}")
    found = [one.change for one in savings.single_changes(Planner(*given(*own), "cpu"))]
    (advised,) = [one for one in found if "chunks" in one] or ["memory.forward_chunks=1"]
    assert advised == f"memory.forward_chunks={min(eval_batch_size, 4)}"
    given(*own, advised)  # which refuses more


@pytest.mark.parametrize(
    ("precision", "target", "expected"),
    [("auto", "cuda", "bf16"), ("auto", "cpu", "fp32"), ("fp16", "cpu", "fp16")],
)
def test_precision_is_that_of_the_target(precision, target, expected) -> None:
    assert arithmetic(Precision(precision), target) == expected


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [("auto", None, "cuda"), ("cpu", None, "cpu"), ("mps", None, "cpu"), ("cpu", "cuda", "cuda")],
)
def test_the_target_is_what_is_asked_for_or_the_runs(device, asked, expected) -> None:
    assert target_of(TrainerConfig(device=Device(device)), asked) == expected


@pytest.mark.parametrize(
    ("device", "asked", "here", "said"),
    [
        ("auto", None, False, True),
        ("auto", None, True, False),
        ("auto", "cuda", False, False),
        ("cpu", None, False, False),
        ("cuda", None, False, False),
    ],
)
def test_a_card_that_nobody_named_is_said_to_be_planned_for(
    monkeypatch, device, asked, here, said
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    remark = target_remark(TrainerConfig(device=Device(device)), asked)
    assert (remark is not None) == said
    assert not said or "memory.target=cpu" in str(remark)


def test_a_budget_for_a_card_that_is_not_here(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert budget_bytes(None, "cuda") is None
    assert budget_bytes("24GiB", "cuda") == 24 * 2**30
    assert budget_bytes("50%", "cpu") > 2**20
    for text in ("80%", "auto"):
        with pytest.raises(ConfigError, match=r"memory.budget=.*24GiB"):
            budget_bytes(text, "cuda")


def test_a_rank_evaluates_its_share_of_the_batches_that_are_evaluated_at_all(given) -> None:
    lines = ("trainer.devices=2", "data.batch_size=2", "data.eval_batch_size=64")
    whole = peaks(given, *lines)
    one = peaks(given, *lines, "trainer.eval_batches=1")
    half = peaks(given, *lines[:2], "data.eval_batch_size=32")
    assert whole.phase == one.phase == half.phase == "evaluation"
    assert one.by_category["activations"] == half.by_category["activations"]
    assert one.peak_bytes < whole.peak_bytes
