"""Cross-attention that keeps less: what it equals, and what reaches its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expt.errors import ConfigError
from expt.jobs.attention import Attention
from expt.jobs.vision.cross_attention import (
    GatedCrossAttention,
    ImageKeyValue,
    LowRankCrossAttention,
    SharedCrossAttention,
)

WIDTH, HEADS = 16, 2


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, WIDTH), torch.randn(2, 11, WIDTH, requires_grad=True)


def saved_bytes(function) -> int:
    """Return the bytes of the storages that autograd keeps of what `function` computes."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function()
    assert held.grad_fn is not None
    return sum(kept.values())


def test_shared_keys_and_values_are_layers_with_tied_projections() -> None:
    text, image = inputs()
    plain = [Attention(WIDTH, HEADS) for _ in range(3)]
    keys_values = ImageKeyValue(WIDTH, WIDTH)
    keys_values.load_state_dict(plain[0].key_value.state_dict())
    for layer in plain[1:]:
        layer.key_value = plain[0].key_value
    shared = []
    for layer in plain:
        made = SharedCrossAttention(WIDTH, HEADS)
        made.query, made.out = layer.query, layer.out
        shared.append(made)

    def run(layers, memory: Tensor) -> Tensor:
        told = text
        for layer in layers:
            told = told + layer(told, memory)
        return told.square().sum()

    one, other = run(plain, image), run(shared, keys_values(image))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(other, keys_values.weight)[0],
        torch.autograd.grad(one, plain[0].key_value.weight)[0],
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


def test_shared_keys_and_values_are_kept_once() -> None:
    text, image = inputs()[0], torch.randn(2, 500, WIDTH)
    layers = [SharedCrossAttention(WIDTH, HEADS) for _ in range(4)]
    plain = [Attention(WIDTH, HEADS) for _ in range(4)]
    keys_values = ImageKeyValue(WIDTH, WIDTH)
    one = 2 * image.nbytes  # keys and values

    def together() -> Tensor:
        memory = keys_values(image)
        return sum(layer(text, memory) for layer in layers)

    few = saved_bytes(together)
    many = saved_bytes(lambda: sum(layer(text, image) for layer in plain))
    assert few < 1.7 * one
    assert many > 4 * one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_exact_at_full_rank_and_near_below_it(dtype: torch.dtype) -> None:
    text, image = (value.to(dtype) for value in inputs())
    attention = Attention(WIDTH, HEADS).to(dtype)
    exact = attention(text, image)
    gaps = []
    for rank in (WIDTH, 12, 4):
        made = LowRankCrossAttention.approximating(attention, rank)
        found = made(text, image)
        assert found.shape == exact.shape
        gaps.append((found - exact).abs().max().item())
    assert gaps[0] < 1e-5
    assert gaps[0] < gaps[1] < gaps[2]


def test_low_rank_keeps_a_latent_in_place_of_keys_and_values() -> None:
    text, image = inputs()[0], torch.randn(2, 500, WIDTH)
    made, plain = LowRankCrossAttention(WIDTH, HEADS, 2), Attention(WIDTH, HEADS)
    few = saved_bytes(lambda: made(text, image))
    many = saved_bytes(lambda: plain(text, image))
    assert few < image.nbytes * 1.5  # the image, and a latent of an eighth
    assert many > image.nbytes * 3  # the image, keys and values


def test_low_rank_trains_all_of_its_weights() -> None:
    text, image = inputs()
    made = LowRankCrossAttention(WIDTH, HEADS, 4)
    made(text, image).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    assert image.grad is not None
    wide = LowRankCrossAttention(WIDTH, HEADS, 4, image_width=6)
    assert wide(text, torch.randn(2, 5, 6)).shape == text.shape


def test_a_gate_is_closed_at_first_and_trains() -> None:
    text, image = inputs()
    gated = GatedCrossAttention(Attention(WIDTH, HEADS))
    target = torch.randn(2, 3, WIDTH)
    assert gated(text, image).abs().max() == 0
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05)
    before = gated.attention.out.weight.detach().clone()
    losses = []
    for _ in range(5):
        loss = (gated(text, image) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gated.gate.item() != 0
    assert not gated.attention.out.weight.equal(before)
    assert losses == sorted(losses, reverse=True)


def test_a_gate_by_a_threshold_gets_no_gradient() -> None:
    # What the handbook has, so that the docstring's word is proven.
    score = torch.nn.Linear(WIDTH, 1)
    text, image = inputs()
    attention = Attention(WIDTH, HEADS)
    opened = score(text).sigmoid().mean() > 0.0
    out = text + attention(text, image) if opened else text
    out.sum().backward()
    assert score.weight.grad is None
    assert attention.out.weight.grad is not None


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads=3 must divide width=16"):
        SharedCrossAttention(WIDTH, 3)
    with pytest.raises(ConfigError, match="num_heads=0 must divide"):
        LowRankCrossAttention(WIDTH, 0, 4)
    for rank in (0, WIDTH + 1):
        with pytest.raises(ConfigError, match=f"rank={rank} must be from 1"):
            LowRankCrossAttention(WIDTH, HEADS, rank)
