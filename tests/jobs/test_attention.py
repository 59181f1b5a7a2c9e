"""Letters: `L` tokens, `S` memory, `D` width, `H` heads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from expt.jobs import attention
from expt.jobs.attention import Attention, EncoderLayer
from expt.memory.measuring.ledger import StorageLedger


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(attention: Attention, query: Tensor, memory: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D/H)) v per head, with the weights materialised; [L,D], [S,D]."""
    width = query.shape[-1]
    size = width // attention.num_heads
    queries = query @ attention.query.weight.T + attention.query.bias
    both = memory @ attention.key_value.weight.T + attention.key_value.bias
    keys, values = both[..., :width], both[..., width:]
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = queries[..., part] @ keys[..., part].mT / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ values[..., part])
    return torch.cat(heads, dim=-1) @ attention.out.weight.T + attention.out.bias


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5)])
def test_attention_equals_softmax_by_hand(num_heads: int, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attention = Attention(embed_dim=16, num_heads=num_heads)
    query, memory = torch.randn(*leading, 7, 16), torch.randn(*leading, 11, 16)
    result = attention(query, memory)
    assert result.shape == query.shape
    expected = by_hand(attention, query, memory)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_by_hand() -> None:
    torch.manual_seed(0)
    attention = Attention(embed_dim=16, num_heads=4)
    query = torch.randn(2, 7, 16, requires_grad=True)
    parameters = [query, *attention.parameters()]
    seed = torch.randn(2, 7, 16)
    ours = torch.autograd.grad((attention(query, query) * seed).sum(), parameters)
    expected = torch.autograd.grad((by_hand(attention, query, query) * seed).sum(), parameters)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_axes_before_the_tokens_do_not_mix() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(embed_dim=16, num_heads=4, ffn_ratio=2, dropout=0.0)
    tokens = torch.randn(2, 3, 5, 16)
    changed = tokens.clone()
    changed[1, 2] += 1.0
    difference = (layer(changed) - layer(tokens)).abs().amax(dim=(-2, -1))
    assert difference[1, 2] > 1e-3
    difference[1, 2] = 0
    torch.testing.assert_close(difference, torch.zeros(2, 3))


def test_the_encoder_layer_normalises_after_each_sum() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(embed_dim=16, num_heads=4, ffn_ratio=3, dropout=0.0)
    tokens = torch.randn(2, 5, 16)
    first, _, second = layer.feed_forward
    assert first.weight.shape == (48, 16)
    middle = layer.attention_norm(tokens + by_hand(layer.attention, tokens, tokens))
    hidden = (middle @ first.weight.T + first.bias).clamp(min=0)
    expected = layer.feed_forward_norm(middle + hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(layer(tokens), expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(embed_dim=16, num_heads=4, ffn_ratio=2, dropout=0.5)
    tokens = torch.randn(1, 5, 16)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    torch.testing.assert_close(layer(tokens), layer(tokens), rtol=0, atol=0)


LONG, HEADS = 2048, 4
MATRIX_BYTES = HEADS * LONG * LONG * 4
"""What one [H, L, L] matrix of weights would take."""


def peak_of(step) -> int:
    with StorageLedger() as ledger:
        step()
    return ledger.peak_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_matrix_of_weights_in_forward_or_backward(dropout: float) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(embed_dim=16, num_heads=HEADS, ffn_ratio=2, dropout=dropout)
    tokens = torch.randn(1, LONG, 16, requires_grad=True)
    assert peak_of(lambda: layer(tokens).sum().backward()) < MATRIX_BYTES / 8


def test_no_matrix_of_weights_over_another_axis_or_in_bf16() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(embed_dim=16, num_heads=HEADS, ffn_ratio=2, dropout=0.1)
    tokens = torch.randn(1, LONG, 1, 16, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            encoded = layer(tokens.transpose(1, 2))
        encoded.float().sum().backward()

    assert peak_of(step) < MATRIX_BYTES / 8


def test_the_ledger_would_see_the_matrix() -> None:
    attention = Attention(embed_dim=16, num_heads=HEADS)
    tokens = torch.randn(LONG, 16)
    assert peak_of(lambda: by_hand(attention, tokens, tokens)) > MATRIX_BYTES / HEADS


def test_more_sequences_than_a_kernel_takes_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention.Attention(8, 2)
    tokens = torch.randn(7, 3, 8)
    whole = module(tokens, tokens)
    monkeypatch.setattr(attention, "MAX_BATCH", 3)
    torch.testing.assert_close(module(tokens, tokens), whole)
