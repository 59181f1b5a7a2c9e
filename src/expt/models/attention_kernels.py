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
    parts = []
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        first, last = max(start - window, 0), min(stop + window, length)
        distance = (
            torch.arange(start, stop, device=queries.device)[:, None]
            - torch.arange(first, last, device=queries.device)[None, :]
        )
        parts.append(
            F.scaled_dot_product_attention(
                queries[..., start:stop, :],
                keys[..., first:last, :],
                values[..., first:last, :],
                attn_mask=distance.abs() <= window,
            )
        )
    return torch.cat(parts, dim=-2)


def top_k(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    """Attend to the `k` keys with the highest scores, per query and head.

    Each chunk of queries is computed again in the backward pass, so that no more than a chunk's
    scores are in memory at any time (top-k attention as in Gupta et al., arXiv:2106.06899).
    """
    if k >= keys.shape[-2]:
        return fused(queries, keys, values)
    parts = []
    for chunk in queries.split(CHUNK, dim=-2):
        if torch.is_grad_enabled():
            part = checkpoint(
                _best_keys, chunk, keys, values, k, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = _best_keys(chunk, keys, values, k)
        parts.append(part)
    return torch.cat(parts, dim=-2)


def _best_keys(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    best = scores.topk(k, dim=-1, sorted=False).indices
    others = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, value=False)
    weights = scores.masked_fill(others, float("-inf")).softmax(dim=-1)
    return weights.to(values.dtype) @ values
