"""Every kernel against attention with a dense mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from expt.jobs import attention as attention_kernels
from expt.jobs.attention import Attention
from expt.memory.measuring.ledger import StorageLedger

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v over the allowed pairs, in double precision."""
    queries, keys, values = (part.double() for part in (queries, keys, values))
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ values


def inputs(length: int, memory: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [length, memory or length, memory or length]
    return [torch.randn(2, 3, size, 8, requires_grad=True) for size in shapes]


def near(length: int, window: int) -> Tensor:
    place = torch.arange(length)
    return (place[:, None] - place).abs() <= window


def highest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    scores = queries @ keys.mT
    return scores >= scores.sort(-1, descending=True).values[..., k - 1 : k]


def agree(kernel: Kernel, allowed: Callable[..., Tensor], parts: list[Tensor]) -> None:
    """Compare output and all three gradients with the dense reference's."""
    expected = dense(*parts, allowed(*parts))
    result = kernel(*parts)
    seed = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad((result * seed).sum(), parts)
    theirs = torch.autograd.grad((expected * seed).sum(), parts)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True, params=[4, 256])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks smaller and larger than the sequences, which are taken one by one or together."""
    monkeypatch.setattr(attention_kernels, "CHUNK", request.param)
    monkeypatch.setattr(attention_kernels, "MAX_SCORES", 10 * request.param**2)


@pytest.mark.parametrize("kernel", [attention_kernels.fused, attention_kernels.materialised])
def test_fused_and_math_are_the_same_attention(kernel: Kernel) -> None:
    agree(kernel, lambda q, k, v: torch.ones(7, 11, dtype=torch.bool), inputs(7, 11))


@pytest.mark.parametrize("window", [1, 3, 9, 10, 50])
def test_a_window_is_dense_attention_with_a_band(window: int) -> None:
    kernel = partial(attention_kernels.sliding_window, window=window)
    agree(kernel, lambda q, k, v: near(11, window), inputs(11))


@pytest.mark.parametrize("k", [1, 3, 10, 11, 50])
def test_top_k_is_dense_attention_over_the_best_keys(k: int) -> None:
    kernel = partial(attention_kernels.top_k, k=k)
    agree(kernel, lambda q, keys, v: highest(q, keys, min(k, 11)), inputs(9, 11))


def test_ties_are_broken_not_shared() -> None:
    queries, keys = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 6, 4)
    values = torch.eye(6).view(1, 1, 6, 6)
    weights = attention_kernels.top_k(queries, keys, values, k=2).flatten()
    assert sorted(weights.tolist()) == [0, 0, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize("kernel", ["math", "fused", "sliding_window", "top_k"])
def test_a_kernel_runs_under_autocast(kernel: str) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 4)
    tokens = torch.randn(2, 9, 16)
    plain = attention(tokens, tokens)
    attention.attention_kernel = kernel
    attention.attention_window = attention.attention_top_k = 9
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(tokens, tokens)
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), plain, atol=3e-2, rtol=3e-2)


def test_the_layer_uses_the_kernel_it_is_set_to() -> None:
    torch.manual_seed(0)
    attention, tokens = Attention(16, 4), torch.randn(2, 9, 16)
    whole = attention(tokens, tokens)
    attention.attention_kernel, attention.attention_window = "sliding_window", 2
    assert not torch.allclose(attention(tokens, tokens), whole)
    # A window over another memory means nothing: all of it is attended to.
    assert torch.equal(attention(tokens, tokens.clone()), whole)
    attention.attention_kernel, attention.attention_top_k = "top_k", 2
    assert not torch.allclose(attention(tokens, tokens), whole)
    attention.attention_kernel = "math"
    torch.testing.assert_close(attention(tokens, tokens), whole)
    attention.attention_kernel = "flash"
    with pytest.raises(ValueError, match="flash"):
        attention(tokens, tokens)


def test_only_math_keeps_a_matrix_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "CHUNK", 64)
    length, heads = 512, 2
    matrix = heads * length * length * 4
    parts = [torch.randn(1, heads, length, 8, requires_grad=True) for _ in range(3)]

    def peak(kernel: Kernel) -> int:
        with StorageLedger() as ledger:
            kernel(*parts).sum().backward()
        return ledger.peak_bytes

    assert peak(attention_kernels.materialised) > 2 * matrix
    assert peak(attention_kernels.fused) < matrix / 4
    assert peak(partial(attention_kernels.sliding_window, window=16)) < matrix / 4
    # Scores, selection, weights and their gradients of one chunk, an eighth of the queries.
    assert peak(partial(attention_kernels.top_k, k=16)) < 0.9 * matrix


def test_top_k_takes_few_of_many_sequences_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "CHUNK", 256)
    parts = [torch.randn(64, 2, 64, 8, requires_grad=True) for _ in range(3)]
    peaks = []
    for limit in (10**9, 4 * 2 * 64 * 64):
        monkeypatch.setattr(attention_kernels, "MAX_SCORES", limit)
        with StorageLedger() as ledger:
            attention_kernels.top_k(*parts, k=8).sum().backward()
        peaks.append(ledger.peak_bytes)
    assert peaks[1] < peaks[0] / 3
