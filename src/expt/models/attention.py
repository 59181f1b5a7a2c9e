"""Multi-head attention and the encoder layer made of it, over the second-to-last axis.

By default weights are never materialised: `scaled_dot_product_attention` picks a fused kernel,
which keeps the inputs and one number per query for the backward pass. Dropout acts on the
branches, not on the weights, since weight dropout would force the kernel that materialises them.
`expt.models.attention_kernels` has the other ways to attend.

Letters: `L` tokens that attend to each other, `S` tokens attended to, `D` width, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from expt.models import attention_kernels

MAX_BATCH = 65_535


class Attention(nn.Module):
    """Multi-head attention of queries [..., L, D] over a memory [..., S, D] -> [..., L, D].

    The attributes `attention_kernel` (fused, math, sliding_window, top_k), `attention_window`
    (tokens to either side) and `attention_top_k` (keys per query) may be set from outside.
    A window is of self-attention only: over another memory, its positions mean nothing, and all
    of it is attended to.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_kernel = "fused"
        self.attention_window: int | None = None
        self.attention_top_k: int | None = None
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Return the attended values [..., L, D]."""
        queries = self._heads(self.query(query))
        keys, values = (self._heads(part) for part in self.key_value(memory).chunk(2, dim=-1))
        attend = self._kernel(is_self=query is memory)
        # CUDA's kernels put the batch on a grid axis of 65,535 blocks.
        parts = [
            attend(*part)
            for part in zip(*(t.split(MAX_BATCH) for t in (queries, keys, values)), strict=True)
        ]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)  # [batch, H, L, D/H]
        return self.out(mixed.transpose(1, 2).reshape(query.shape))  # type: ignore[no-any-return]

    def _kernel(self, is_self: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        match self.attention_kernel:
            case "math":
                return attention_kernels.materialised
            case "sliding_window" if is_self:
                assert self.attention_window is not None
                return partial(attention_kernels.sliding_window, window=self.attention_window)
            case "top_k":
                assert self.attention_top_k is not None
                return partial(attention_kernels.top_k, k=self.attention_top_k)
            case "fused" | "sliding_window":
                return attention_kernels.fused
        raise ValueError(f"attention_kernel={self.attention_kernel!r} is no kernel")

    def _heads(self, tokens: Tensor) -> Tensor:
        """[..., L, D] -> [batch, H, L, D/H]; fused kernels want exactly four axes."""
        *_, length, width = tokens.shape
        split = tokens.reshape(-1, length, self.num_heads, width // self.num_heads)
        return split.transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each a residual branch normalised after the sum."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_ratio: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(embed_dim, num_heads)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_dim, ffn_ratio * embed_dim),
            nn.ReLU(inplace=True),
            nn.Linear(ffn_ratio * embed_dim, embed_dim),
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens [..., L, D] -> [..., L, D]."""
        tokens = self.attention_norm(tokens + self.dropout(self.attention(tokens, tokens)))
        encoded: Tensor = self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))
        return encoded
