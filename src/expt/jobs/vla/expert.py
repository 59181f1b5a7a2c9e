"""The action expert: a transformer over the steps of a chunk that looks at what the backbone saw.

Its layers are modulated by the level of noise and the sensors, as those of DiT (Peebles and Xie,
ICCV 2023) are by the time and the class.

Letters: `B` samples, `H` steps of a chunk, `A` actions, `W` width, `M` tokens looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from expt.jobs.attention import Attention

PERIOD = 1e4
"""Ratio of the longest period to the shortest, of the level's embedding."""


class Expert(nn.Module):
    """What the objective wants, of noisy actions and their surroundings.

    Args:
        action_size: A.
        chunk: H.
        width: W, a multiple of `heads`.
        depth: layers.
        heads: of every attention.

    """

    def __init__(self, action_size: int, chunk: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.action = nn.Linear(action_size, width)
        self.position = nn.Parameter(0.02 * torch.randn(chunk, width))
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(ExpertLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, action_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, noisy: Tensor, level: Tensor, state: Tensor, context: Tensor, mask: Tensor
    ) -> Tensor:
        """Return [B,H,A] of noisy actions [B,H,A].

        Args:
            noisy: the actions with their noise.
            level: of the noise, [B].
            state: the sensors' features [B,W].
            context: the tokens looked at [B,M,W].
            mask: bool [B,M], true where there is one.

        """
        condition = self.level(periodic(level, state.shape[-1]).to(state.dtype)) + state
        tokens = self.action(noisy) + self.position
        for layer in self.layers:
            tokens = layer(tokens, condition, context, mask)
        found: Tensor = self.out(self.norm(tokens))
        return found


class ExpertLayer(nn.Module):
    """Attention among the steps, to the context, and a feed-forward, each a modulated branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        shifts = nn.Linear(width, 6 * width)
        nn.init.zeros_(shifts.weight)
        nn.init.zeros_(shifts.bias)
        self.modulation = nn.Sequential(nn.SiLU(), shifts)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.context_norm = nn.LayerNorm(width)
        self.context_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, condition: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return tokens [B,H,W] of tokens [B,H,W]; the rest as `Expert.forward` has it."""
        shift, scale, gate, shift_2, scale_2, gate_2 = (
            self.modulation(condition)[:, None].chunk(6, dim=-1)
        )  # fmt: skip
        modulated = self.norm(tokens) * (1 + scale) + shift
        tokens = tokens + (1 + gate) * self.attention(modulated, modulated)
        looked = self.context_attention(
            self.context_norm(tokens), context, context, key_padding_mask=~mask, need_weights=False
        )[0]
        tokens = tokens + looked
        modulated = self.feed_forward_norm(tokens) * (1 + scale_2) + shift_2
        found: Tensor = tokens + (1 + gate_2) * self.feed_forward(modulated)
        return found


def periodic(level: Tensor, width: int) -> Tensor:
    """Return sines and cosines [B,width] of levels [B] in [0, 1]."""
    half = width // 2
    rates = torch.exp(-math.log(PERIOD) * torch.arange(half, device=level.device) / half)
    angles = 1000 * level.float()[:, None] * rates
    return torch.cat(
        [angles.sin(), angles.cos(), angles.new_zeros(level.shape[0], width % 2)], dim=1
    )
