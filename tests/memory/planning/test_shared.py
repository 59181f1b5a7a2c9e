"""Parts of traces put together are what the whole trace would have been."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from expt.config.validate import validated
from expt.memory import plan
from expt.memory.planning.shared import Shared
from expt.run.build import build, techniques_of
from expt.run.planner import plan_training


@pytest.fixture
def planned(composed):
    """A function that plans a small training with changed techniques, sharing parts or not."""
    settings = validated(composed("+memory=lite", "data.batch_size=8", "data.eval_batch_size=8"))
    data = build(settings, "data")

    def planned(target: str, shared: Shared | None, **changes):
        techniques = replace(techniques_of(settings.memory), **changes)
        return plan_training(settings, data, target, techniques, shared=shared)

    return planned


CHANGES = (
    {"gradient_accumulation": 4},
    {"activation_checkpointing": True},
    {"forward_chunks": 4},
    {"forward_chunks": 4, "gradient_accumulation": 4},
)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_a_plan_of_shared_parts_is_the_plan(planned, target, monkeypatch) -> None:
    from expt.memory.planning import traced_step

    shared = Shared()
    steps: list[int] = []
    take = traced_step.PreparedStep.take
    monkeypatch.setattr(
        traced_step.PreparedStep, "take", lambda prepared: (steps.append(1), take(prepared))[1]
    )
    planned(target, shared)
    assert len(steps) == 2 and shared.steps_alike
    took: list[str] = []
    for name in ("_take_steps", "_evaluate"):
        part = getattr(traced_step, name)
        monkeypatch.setattr(
            traced_step, name, lambda *a, p=part, n=name: (took.append(n), p(*a))[1]
        )
    for changes, traced in zip(
        CHANGES, ("_take_steps", "_take_steps", "_evaluate", ""), strict=True
    ):
        took.clear()
        steps.clear()
        short = planned(target, shared, **changes)
        assert took == [traced] * bool(traced)
        assert len(steps) == (traced == "_take_steps"), "the second of two equal steps is not run"
        whole = planned(target, None, **changes)
        for name in ("peak_bytes", "reserved_bytes", "phase", "by_category", "interval_bytes"):
            assert getattr(short, name) == getattr(whole, name), (changes, name)


class Growing(nn.Module):
    """Keeps what it was given last, of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.kept: list[torch.Tensor] = []

    def forward(self, x):
        found = self.linear(x)
        self.kept.append(found.detach().clone())
        return found


@pytest.mark.parametrize("alike", [True, False])
def test_a_step_that_differs_from_the_last_is_run(alike) -> None:
    shared, calls = Shared(), []

    def batch() -> torch.Tensor:
        calls.append(1)
        return torch.ones(32, 64)

    for key in ("one", "other"):
        calls.clear()
        plan(
            (lambda: nn.Linear(64, 64)) if alike else Growing, batch,
            lambda weights: torch.optim.Adam(weights), lambda model, x: model(x).sum(),
            target="cpu", shared=shared, keys=(key, key),
        )  # fmt: skip
        if key == "one":
            assert len(calls) > 2
    assert shared.steps_alike is alike
    assert (len(calls) == 1) is alike


def test_what_decides_on_values_is_not_kept() -> None:
    class Deciding(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2 if (self.weight.sum() > 0).item() else 1)

    shared = Shared()
    plan(
        lambda: Deciding(4, 4), lambda: torch.ones(2, 4),
        lambda weights: torch.optim.SGD(weights, 0.1), lambda model, x: model(x).sum(),
        target="cpu", shared=shared, keys=("steps", "evaluation"),
    )  # fmt: skip
    assert not shared.has_steps("steps")
    assert not shared.has_evaluation("evaluation")
