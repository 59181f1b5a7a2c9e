"""What a traced model keeps in a cache of its own must not reach a training."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from expt.memory import plan

KEPT: dict[int, Tensor] = {}


@functools.lru_cache
def table(count: int) -> Tensor:
    return torch.linspace(0, 1, count)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + table(8)


class Keeping(Cached):
    def forward(self, x: Tensor) -> Tensor:
        if 8 not in KEPT:
            KEPT[8] = torch.linspace(0, 1, 8)
        return self.layer(x) + KEPT[8]


def planned(model_fn):
    return plan(
        model_fn,
        lambda: torch.randn(4, 8),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda model, batch: F.mse_loss(model(batch), batch),
        target="cpu",
    )


def test_a_function_cache_is_empty_after_a_plan():
    table.cache_clear()
    found = planned(Cached)
    assert not any("without values" in note for note in found.notes)
    assert type(table(8)) is Tensor
    assert type(Cached()(torch.randn(4, 8))) is not FakeTensor


def test_any_other_cache_is_told_of():
    KEPT.clear()
    found = planned(Keeping)
    assert any("without values" in note for note in found.notes)
    KEPT.clear()
    assert not any("without values" in note for note in planned(Cached).notes)
