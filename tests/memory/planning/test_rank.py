"""A plan of one of several ranks, without the others; measured ones are in tests/run/test_ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.memory import plan
from expt.memory.planning.rank import PlannedRank

WIDTH, BLOCKS = 128, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return x


def planned(rank: PlannedRank):
    with rank.grouped():
        return plan(
            Net,
            lambda: torch.randn(4, WIDTH),
            lambda weights: torch.optim.AdamW(weights, fused=True),
            lambda forward, x: forward(x).square().mean(),
            target="cpu",
            prepare=rank.prepare,
            last_backward=rank.last_backward,
        )


def test_sharded_a_rank_has_its_part_of_weights_gradients_and_state() -> None:
    one = planned(PlannedRank())
    for count in (2, 4):
        found = planned(PlannedRank(count, sharded=True))
        assert found.method == "trace"
        assert not any("without values" in note or "differ" in note for note in found.notes)
        for name in ("parameters", "optimizer_state"):
            assert found.by_category[name] == pytest.approx(one.by_category[name] / count, rel=0.01)
        assert found.peak_bytes < one.peak_bytes
    import torch.distributed as dist

    assert not dist.is_initialized()


def test_whole_models_take_a_bucket_more_at_most() -> None:
    one, two = planned(PlannedRank()), planned(PlannedRank(2))
    assert two.by_category["parameters"] == one.by_category["parameters"]
    weights = BLOCKS * (WIDTH * WIDTH + WIDTH) * 4
    assert one.peak_bytes <= two.peak_bytes <= one.peak_bytes + weights
    assert not any("without values" in note for note in two.notes)
    assert PlannedRank(2).noted(two).notes[0].startswith("of one of 2 ranks (ddp)")


def test_the_largest_share_is_planned() -> None:
    assert [PlannedRank(3).share(count) for count in (1, 6, 7)] == [1, 2, 3]
