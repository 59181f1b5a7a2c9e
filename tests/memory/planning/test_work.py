"""The arithmetic of a step is counted, with what is computed again."""

from __future__ import annotations

import torch
from torch import nn

from expt.jobs.attention import EncoderLayer
from expt.memory.planning.work import count_flops
from expt.memory.techniques.techniques import Techniques, apply

LAYERS, TOKENS, WIDTH, BATCH = 3, 10, 16, 4


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(WIDTH, 2, 4, 0.0) for _ in range(LAYERS))

    def forward(self, tokens):
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


def counted(prepare=lambda model: None, batch=BATCH) -> int:
    return count_flops(
        Encoder,
        lambda: torch.randn(batch, TOKENS, WIDTH),
        lambda forward, tokens: forward(tokens).sum(),
        prepare,
    )


def test_products_are_two_operations_each_and_backward_does_them_twice() -> None:
    linear = 2 * BATCH * TOKENS * WIDTH * WIDTH * (1 + 2 + 1 + 4 + 4)
    attention = 2 * 2 * BATCH * TOKENS * TOKENS * WIDTH
    forward = LAYERS * (linear + attention)
    first = 2 * BATCH * TOKENS * WIDTH * WIDTH * 3  # the input needs no gradient
    assert counted() == 3 * forward - first
    assert counted(batch=2 * BATCH) == 2 * counted()


def test_checkpointing_computes_the_forward_pass_once_more() -> None:
    state = torch.get_rng_state()
    more = counted(lambda model: apply(model, Techniques(activation_checkpointing=True)))
    plain = counted()
    assert plain < more <= plain * 4 / 3 + plain * 0.05
    assert torch.equal(torch.get_rng_state(), state)
