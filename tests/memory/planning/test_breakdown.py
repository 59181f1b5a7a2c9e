"""Modules by level or by bytes, and events with outputs held."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expt.memory import plan
from expt.memory.planning.breakdown import cut_by_bytes, cut_by_level


def test_large_modules_are_split_and_small_ones_are_not() -> None:
    modules = {
        "encoder.layers.0.attention.query": 400,
        "encoder.layers.0.attention.key": 300,
        "encoder.layers.0.norm": 1,
        "encoder.layers.1.norm": 1,
        "head": 300,
        "scale": 1,
        "(inputs)": 2,
    }
    assert cut_by_bytes(modules) == {
        "encoder.layers.0.attention.query": 400,
        "encoder.layers.0.attention.key": 300,
        "encoder.layers.0": 1,
        "encoder.layers": 1,
        "head": 300,
        "scale": 1,
        "(inputs)": 2,
    }


def test_modules_are_cut_at_any_level() -> None:
    modules = {"a.b.c.d.e": 1, "a.b.x": 2, "z": 3, "(inputs)": 4}
    assert cut_by_level(modules, 1) == {"a": 3, "z": 3, "(inputs)": 4}
    assert cut_by_level(modules, 2) == {"a.b": 3, "z": 3, "(inputs)": 4}
    assert cut_by_level(modules, 9) == modules


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Deep(depth - 1) if depth else nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_plan_takes_a_depth() -> None:
    def names(depth: int | None) -> set[str]:
        planned = plan(
            lambda: Deep(5), lambda: torch.randn(4, 64), torch.optim.Adam,
            lambda model, batch: model(batch).sum(), target="cpu", depth=depth,
        )  # fmt: skip
        assert (
            sum(planned.by_module.values())
            == planned.peak_bytes - planned.by_category["workspaces"]
        )
        return {name for name in planned.by_module if not name.startswith("(")}

    assert names(2) == {"inner.inner"}
    assert names(None) == {".".join(["inner"] * 6)}
