"""Ways to compute attention, from queries, keys and values to the attended values.

============== =============================== ==================================================
fused          softmax(q k' / sqrt(E)) v       never materialises the weights; the default
math           the same, to rounding           keeps the [L, S] weights of every head: what the
                                               fused kernel is measured against
sliding_window over keys with |i - j| <= window  another model; memory and time linear in L
top_k          over each query's k best keys   another model; memory linear in L, time is not
============== =============================== ==================================================

None of them takes dropout. Letters: `B` batch, `H` heads, `L` queries, `S` keys, `E` width of a
head; queries are [B, H, L, E], keys and values [B, H, S, E].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
