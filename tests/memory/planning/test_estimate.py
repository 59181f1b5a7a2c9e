"""What takes the place of a trace: real steps if the model is small, else what is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expt.memory import Plan, plan
from expt.memory.measuring.ledger import StorageLedger
from expt.memory.planning import estimate

WIDTH = 128
LAYER = (WIDTH * WIDTH + WIDTH) * 4

pytestmark = pytest.mark.usefixtures("unfrozen")


class Branching(nn.Module):
    """Looks at values that follow from weights: there are none in fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) if y.sum() > -1e9 else y


class Selecting(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y[y[:, 0] > -1e9]


class Foreign(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) * float(y.detach().numpy().max())


class Wrapping(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except RuntimeError as error:
            raise ValueError("my layer failed") from error


class Plain(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Wrong(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.ones(3, 3)


def squares(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return forward(batch).square().mean()


def batch() -> Tensor:
    return torch.randn(2048, WIDTH)


def predict(model: Callable[[], nn.Module], **settings: Any) -> Plan:
    return plan(model, batch, torch.optim.AdamW, squares, **{"target": "cpu", **settings})


@pytest.mark.parametrize("model", [Branching, Selecting, Foreign, Wrapping])
def test_a_small_model_that_cannot_be_traced_is_run_for_real(measured, model) -> None:
    planned = predict(model)
    peak = measured(model, batch, torch.optim.AdamW, squares)
    assert planned.method == "estimate"
    assert planned.peak_bytes == pytest.approx(peak, rel=0.03)
    low, high = planned.interval_bytes
    assert low <= 0.95 * peak < 1.1 * peak <= high, "wider than a trace's"
    assert sum(planned.by_category.values()) == planned.peak_bytes
    assert "cannot be run on fake tensors" in planned.notes[0]
    assert "run for real" not in planned.notes[0]
    assert "taken for real on the CPU" in planned.notes[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_real_step_follows_the_targets_rules_like_a_trace(precision) -> None:
    real = predict(Branching, target="cuda", precision=precision)
    traced = predict(Plain, target="cuda", precision=precision)
    assert (real.method, traced.method) == ("estimate", "trace")
    assert real.peak_bytes == pytest.approx(traced.peak_bytes, rel=0.01)
    assert real.by_category["parameters"] == traced.by_category["parameters"]


def test_a_real_step_leaves_nothing_and_is_not_counted() -> None:
    before = torch.get_rng_state()
    with StorageLedger() as ledger:
        predict(Branching)
    assert ledger.peak_bytes == ledger.allocated_bytes == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "value"), [("MAX_REAL_BYTES", 1000), ("MAX_REAL_SHARE", 0), ("MAX_HOST_SHARE", 1e-9)]
)
def test_a_large_one_is_added_up_and_has_no_upper_bound(monkeypatch, name, value) -> None:
    monkeypatch.setattr(estimate, name, value)
    planned = predict(Foreign, resident=[data := torch.ones(77)])
    assert planned.method == "estimate"
    assert planned.by_category == {
        "parameters": 2 * LAYER,
        "gradients": 2 * LAYER,
        "optimizer_state": 4 * LAYER + 4 * 4,
        "activations": 0,
        "temporaries": 0,
        "inputs": 2048 * WIDTH * 4 + data.nbytes,
        "workspaces": 0,
    }
    assert planned.peak_bytes == sum(planned.by_category.values()) == planned.interval_bytes[0]
    assert planned.interval_bytes[1] is None
    assert planned.reserved_bytes is None
    assert "NOT included" in planned.notes[0]
    assert planned.fits(planned.peak_bytes - 1) is False
    assert planned.fits(2**40) is None, "not known: activations are missing"


def test_weights_alone_are_counted_without_being_made() -> None:
    class Big(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(2**32))  # 16 GiB

    planned = predict(Big)
    assert planned.by_category["parameters"] == 2**34 + 2 * LAYER
    assert planned.interval_bytes[1] is None


@pytest.mark.parametrize("real", [False, True])
def test_the_users_own_error_is_not_swallowed(real) -> None:
    class Early(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) @ torch.ones(3, 3)

    with pytest.raises(RuntimeError, match=r"shape|reduction dim"):
        predict(Wrong if real else Early)


def test_the_reason_names_the_error_and_the_users_line() -> None:
    (note, *_) = predict(Wrapping).notes
    assert "RuntimeError: " in note
    assert f"{__file__}:" in note, "not a line of torch's"


def test_a_large_model_that_asks_for_values_is_traced_with_stated_answers(monkeypatch) -> None:
    monkeypatch.setattr(estimate, "MAX_REAL_BYTES", 0)
    planned, straight = predict(Branching), predict(Plain)
    assert planned.method == "trace"
    (note,) = [note for note in planned.notes if "not known" in note]
    assert f"a boolean at {__file__}:" in note
    assert "False" in note
    assert planned.peak_bytes < straight.peak_bytes, "the other way through the model"
    low, high = planned.interval_bytes
    assert low < straight.peak_bytes < high, "and the interval has both"


def test_an_error_of_the_users_is_in_the_note_where_the_model_is_too_large(monkeypatch) -> None:
    monkeypatch.setattr(estimate, "MAX_REAL_BYTES", 0)
    planned = predict(Wrong)
    assert planned.interval_bytes[1] is None
    assert __file__ in planned.notes[0]
