"""What a search that finds nothing says: one quantity, and which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expt.config.validate import validated
from expt.errors import ConfigError
from expt.memory.planning.plan import CATEGORIES, Plan
from expt.run import batch_size as module
from expt.run import planner
from expt.run.build import build
from expt.units import MIB

PLAN = Plan(
    target="cuda",
    peak_bytes=5 * MIB,
    reserved_bytes=20 * MIB,
    interval_bytes=(4 * MIB, 6 * MIB),
    phase="backward",
    by_category=dict.fromkeys(CATEGORIES, 0) | {"activations": 5 * MIB},
    by_module={},
    corrections={},
    method="trace",
    seconds=0.1,
)


@pytest.fixture
def refusal(composed, monkeypatch):
    """A function that returns why nothing fits 10 MiB, if every size has this plan."""

    def refusal(plan: Plan, slices: int = 1000) -> str:
        def predict(settings, data, target, techniques=None, *arguments, **others) -> Plan:
            if techniques is not None and techniques.activation_checkpointing is True:
                return replace(plan, peak_bytes=4 * MIB, reserved_bytes=12 * MIB)
            if techniques is not None and techniques.forward_chunks >= slices:
                return replace(plan, peak_bytes=4 * MIB, reserved_bytes=9 * MIB)
            return plan

        for part in (module, planner):
            monkeypatch.setattr(part, "plan_training", predict)
        settings = validated(composed("+memory=minimal", "data.eval_batch_size=16"))
        with pytest.raises(ConfigError) as refused:
            module.fit(settings, build(settings, "data"), "cuda", 10 * MIB, batch_size=8)
        return str(refused.value)

    return refusal


def test_what_is_reserved_is_compared_with_the_budget(refusal) -> None:
    message = refusal(PLAN)
    assert "that is 20.0 MiB (bytes reserved by the allocator; the peak is in backward)" in message
    assert "and the budget is 10.0 MiB; it takes memory.budget=22MiB" in message
    assert "memory.activation_checkpointing=true (12.0 MiB)" in message
    assert "5.0 MiB" not in message, "a peak says nothing about what is reserved"


def test_what_is_reserved_may_take_its_share_of_the_budget(refusal) -> None:
    message = refusal(replace(PLAN, peak_bytes=int(9.5 * MIB), reserved_bytes=10 * MIB))
    assert "that is 10.0 MiB (bytes reserved by the allocator; the peak is in backward)" in message
    assert "and fit.margin=0.952 of the budget (10.0 MiB) is 9.5 MiB" in message


def test_evaluation_that_does_not_fit_is_told_with_the_slices_that_would(refusal) -> None:
    message = refusal(replace(PLAN, phase="evaluation"), slices=8)
    assert "the peak is in evaluation" in message
    assert "data.eval_batch_size=" in message
    assert "memory.forward_chunks=8 (9.0 MiB)" in message
