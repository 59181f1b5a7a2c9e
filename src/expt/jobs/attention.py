"""Multi-head attention and the encoder layer made of it, over the second-to-last axis.

By default weights are never materialised: `scaled_dot_product_attention` picks a fused kernel,
which keeps the inputs and one number per query for the backward pass. Dropout acts on the
branches, not on the weights, since weight dropout would force the kernel that materialises them.
`expt.jobs.attention` has the other ways to attend.

Letters: `L` tokens that attend to each other, `S` tokens attended to, `D` width, `H` heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
                return materialised
            case "sliding_window" if is_self:
                assert self.attention_window is not None
                return partial(sliding_window, window=self.attention_window)
            case "top_k":
                assert self.attention_top_k is not None
                return partial(top_k, k=self.attention_top_k)
            case "fused" | "sliding_window":
                return fused
        raise ValueError(f"attention_kernel={self.attention_kernel!r} is no kernel")

    def _heads(self, tokens: Tensor) -> Tensor:
        """[..., L, D] -> [batch, H, L, D/H]; fused kernels want exactly four axes."""
        *_, length, width = tokens.shape
        split = tokens.reshape(-1, length, self.num_heads, width // self.num_heads)
        return split.transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each a residual branch normalised after the sum."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = round(ffn_ratio * embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_dim, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, embed_dim),
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens [..., L, D] -> [..., L, D]."""
        tokens = self.attention_norm(tokens + self.dropout(self.attention(tokens, tokens)))
        encoded: Tensor = self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))
        return encoded


CHUNK = 256
"""Queries that the last two kernels look at together."""
MAX_SCORES = 2**22
"""Scores that `top_k` has in memory at once, over all sequences and heads: 16 MiB in fp32."""


def fused(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with whichever fused kernel torch picks."""
    return F.scaled_dot_product_attention(queries, keys, values)


def materialised(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with the weights [B, H, L, S] in memory, as they are written in a textbook."""
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    return scores.softmax(dim=-1).to(values.dtype) @ values


def sliding_window(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Attend to the `window` tokens on either side and to oneself; as many keys as queries.

    A chunk of queries sees a slice of keys, masked where a query's window ends, so that the only
    mask is of a chunk's size (local attention as in Beltagy et al., arXiv:2004.05150).
    """
    length = queries.shape[-2]
    if window >= length - 1:
        return fused(queries, keys, values)
    masks: dict[tuple[int, int, int], Tensor] = {}  # all chunks but the outer ones share theirs
    parts = []
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        first, last = max(start - window, 0), min(stop + window, length)
        shape = (stop - start, last - first, start - first)
        if shape not in masks:
            masks[shape] = _band(*shape, window, queries)
        parts.append(
            F.scaled_dot_product_attention(
                _part(queries, start, stop),
                _part(keys, first, last),
                _part(values, first, last),
                attn_mask=masks[shape],
            )
        )
    return _joined(parts, dim=-2)


def top_k(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    """Attend to the `k` keys with the highest scores, per query and head.

    A few sequences and a chunk of their queries are looked at together, and computed again in the
    backward pass, so that no more than their scores are in memory at any time (top-k attention as
    in Gupta et al., arXiv:2106.06899).
    """
    if k >= keys.shape[-2]:
        return fused(queries, keys, values)
    heads, length = queries.shape[1:3]
    together = max(1, MAX_SCORES // (heads * min(length, CHUNK) * keys.shape[-2]))
    done = []
    for some, some_keys, some_values in zip(
        *(part.split(together) for part in (queries, keys, values)), strict=True
    ):
        chunks = [_recomputed(c, some_keys, some_values, k) for c in some.split(CHUNK, dim=-2)]
        done.append(_joined(chunks, dim=-2))
    return _joined(done, dim=0)


def _band(queries: int, keys: int, offset: int, window: int, like: Tensor) -> Tensor:
    """Return what is added to the scores: 0 in the window, -inf outside; [queries, keys].

    In the dtype of `like`, since torch would make a copy of a boolean mask for every chunk.
    """
    rows = torch.arange(offset, offset + queries, device=like.device)
    distance = rows[:, None] - torch.arange(keys, device=like.device)
    return like.new_zeros(queries, keys).masked_fill(distance.abs() > window, float("-inf"))


def _part(tokens: Tensor, start: int, stop: int) -> Tensor:
    """Return a slice of tokens; all of them without one, whose gradient would be a copy."""
    return tokens if stop - start == tokens.shape[-2] else tokens[..., start:stop, :]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)  # one is not copied


def _recomputed(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    if not torch.is_grad_enabled():
        return _best_keys(queries, keys, values, k)
    attended: Tensor = checkpoint(
        _best_keys, queries, keys, values, k, use_reentrant=False, preserve_rng_state=False
    )
    return attended


def _best_keys(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    best = scores.topk(k, dim=-1, sorted=False).indices
    others = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, value=False)
    weights = scores.masked_fill(others, float("-inf")).softmax(dim=-1)
    return weights.to(values.dtype) @ values
