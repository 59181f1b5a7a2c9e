"""What differs from step to step is traced, named, and inside the interval."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expt.memory import Plan, plan

WIDTH = 64
SGD = partial(torch.optim.SGD, lr=1e-3)


def squares(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return forward(batch).square().mean()


def predict(model: Callable[[], nn.Module], batch: Callable[[], Any], **settings: Any) -> Plan:
    return plan(model, batch, SGD, squares, **{"target": "cpu", **settings})


def floats(rows: int = 256) -> Callable[[], Tensor]:
    return lambda: torch.randn(rows, WIDTH)


class Bank(nn.Module):
    """Keeps what it saw, up to `most` rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.layer, self.most = nn.Linear(WIDTH, WIDTH), most
        self.register_buffer("bank", torch.zeros(0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.bank = torch.cat([self.bank, hidden.detach()])[-self.most :]
        return hidden @ self.bank.t()


def test_a_buffer_that_fills_up_is_followed_until_it_is_full() -> None:
    full = predict(partial(Bank, 1024), floats())
    assert full.peak_bytes >= 256 * 1024 * 4
    assert full.interval_bytes[1] is not None
    (note,) = [note for note in full.notes if "steps differ" in note]
    assert "the last are alike" in note


def test_a_buffer_that_goes_on_growing_leaves_the_bound_open() -> None:
    growing = predict(partial(Bank, 10**9), floats())
    assert growing.interval_bytes[1] is None
    assert any("every step leaves" in note for note in growing.notes)
    assert growing.fits(2**40) is None


class Depth(nn.Module):
    """Leaves layers out by chance, as stochastic depth does."""

    def __init__(self, chance: Callable[[], float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index == 0 or self.chance() > 0.5:
                x = x + layer(x).tanh()
        return x


def torchs_chance() -> float:
    return torch.rand(()).item()


@pytest.mark.parametrize("chance", [random.random, torchs_chance])
def test_random_depth_widens_the_interval(chance) -> None:
    random.seed(1)
    torch.manual_seed(1)
    chosen = predict(partial(Depth, chance), floats(1024))
    every = predict(partial(Depth, lambda: 1.0), floats(1024))
    low, high = chosen.interval_bytes
    assert low < chosen.peak_bytes < every.peak_bytes
    assert every.peak_bytes <= high
    assert any("random numbers decide" in note for note in chosen.notes)


def test_random_numbers_that_decide_nothing_cost_no_further_steps() -> None:
    calls = []

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x + torch.rand(WIDTH))

    predict(lambda: Noisy(WIDTH, WIDTH), floats())
    assert len(calls) == 2


def lengths() -> Iterator[int]:
    return cycle([100, 400, 200])


def test_batches_of_other_lengths_are_all_looked_at() -> None:
    rows = lengths()
    model = partial(nn.Linear, WIDTH, WIDTH)
    varying = predict(model, lambda: torch.randn(next(rows), WIDTH))
    longest = predict(model, floats(400))
    assert varying.peak_bytes == pytest.approx(longest.peak_bytes, rel=0.3)
    assert varying.peak_bytes >= longest.peak_bytes
    assert varying.interval_bytes[0] < predict(model, floats(100)).peak_bytes
    assert any("batches have other shapes" in note for note in varying.notes)


def vocabulary() -> nn.Module:
    return nn.Sequential(nn.Embedding(4000, 8), nn.Linear(8, 4000))


def test_outputs_that_a_loop_keeps_are_in_the_interval_or_in_the_peak() -> None:
    def batch() -> Tensor:
        return torch.arange(256)

    def loss(forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(forward(ids), ids)

    logits = 256 * 4000 * 4
    unknown, held, dropped = (
        plan(vocabulary, batch, SGD, loss, target="cpu", holds_outputs=held)
        for held in (None, True, False)
    )
    assert held.peak_bytes - dropped.peak_bytes == pytest.approx(logits, rel=0.01)
    assert unknown.peak_bytes == dropped.peak_bytes
    assert unknown.interval_bytes[1] >= held.peak_bytes
    assert any("keeps the last outputs" in note for note in unknown.notes)
    assert dropped.notes == held.notes == ()
    assert sum(held.by_category.values()) == held.peak_bytes


def test_what_only_the_loops_variable_holds_of_a_batch_is_named() -> None:
    class Halves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0.5)

    model = partial(Halves, WIDTH, WIDTH)
    planned = predict(model, floats(4096))
    assert any("only because a variable of the loop holds it" in n for n in planned.notes)
    plain = predict(partial(nn.Linear, WIDTH, WIDTH), floats(4096))
    assert not any("only because" in note for note in plain.notes)
