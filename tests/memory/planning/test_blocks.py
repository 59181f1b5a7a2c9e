"""A model laid over several cards, checked against plans of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.memory.planning.blocks import Blocks, block_of
from expt.memory.planning.predict import Plan, plan

WIDTH, COUNT, BATCH = 64, 4, 256


class Stack(nn.Module):
    def __init__(self, count: int = COUNT) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(count)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def planned(count: int, needs_grad: bool = False, **more) -> Plan:
    return plan(
        lambda: Stack(count),
        lambda: torch.randn(BATCH, WIDTH).requires_grad_(needs_grad),
        lambda weights: torch.optim.AdamW(weights, fused=True),
        lambda model, batch: model(batch).square().mean(),
        target="cpu",
        holds_outputs=False,
        **more,
    )


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    found = planned(COUNT, blocks=True).blocks
    assert found is not None
    return found


def test_all_blocks_on_one_card_are_the_whole_model(blocks) -> None:
    whole = planned(COUNT)
    split = blocks.split(1)
    assert split.peak_bytes == (whole.peak_bytes - whole.by_category["workspaces"],)


def test_half_of_the_blocks_take_what_a_plan_of_half_the_model_says(blocks) -> None:
    half = planned(COUNT // 2, needs_grad=True)
    split = blocks.split(2)
    assert split.first_blocks == ("layers.0", "layers.2")
    batch = BATCH * WIDTH * 4  # a gradient of the input, and what passes the border
    assert split.largest_bytes == pytest.approx(half.peak_bytes, abs=2 * batch)
    assert split.largest_bytes < 0.6 * blocks.split(1).largest_bytes


def test_more_cards_never_take_more_and_a_block_is_not_divided(blocks) -> None:
    peaks = [blocks.split(cards).largest_bytes for cards in (1, 2, 3, 4, 6)]
    assert peaks == sorted(peaks, reverse=True)
    alone = max(int(one.max()) for one in blocks.series)
    assert peaks[-1] == alone
    assert blocks.split(6).peak_bytes[4:] == (0, 0)


def test_the_steps_of_all_weights_at_once_are_shared_out() -> None:
    found = plan(
        lambda: Stack(), lambda: torch.randn(2, WIDTH),
        lambda weights: torch.optim.AdamW(weights, foreach=True),
        lambda model, batch: model(batch).square().mean(), target="cpu", blocks=True,
    )  # fmt: skip
    assert found.phase == "optimizer_step" and found.blocks is not None
    shares = [int(one.max()) for one in found.blocks.series]
    assert max(shares) < 1.1 * min(shares)


def test_a_plan_that_was_not_asked_has_no_blocks_and_writes_none() -> None:
    assert planned(1).blocks is None
    assert "blocks" not in planned(1, blocks=True).as_dict()


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("layers.3.mlp.0", "layers.3"),
        ("vision.encoder.layers.11.self_attn", "vision.encoder.layers.11"),
        ("lm_head", "lm_head"),
        ("", ""),
    ],
)
def test_a_block_is_what_is_numbered(module, block) -> None:
    assert block_of(module) == block
