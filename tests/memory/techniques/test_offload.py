"""Offload, on a CPU taken for a device; pinned copies need CUDA and are not tested here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expt.memory.techniques import offload
from expt.memory.techniques.offload import OnHost, offload_saved_tensors, remove_offload


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what went to the host."""
    seen: list[tuple[int, ...]] = []

    class Noted(OnHost):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            seen.append(tuple(tensor.shape))

    monkeypatch.setattr(offload, "OnHost", Noted)
    monkeypatch.setattr(offload, "leaves_device", lambda tensor: True)
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)
    return seen


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(inplace=True), nn.Linear(128, 64))


def gradients(model: nn.Module, rows: int) -> list[Tensor]:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    return [weight.grad for weight in model.parameters()]


def test_activations_go_and_weights_stay(packed: list[tuple[int, ...]]) -> None:
    plain, moved = net(), net()
    offload_saved_tensors(moved)
    expected = gradients(plain, 32)
    for one, other in zip(gradients(moved, 32), expected, strict=True):
        assert torch.equal(one, other)
    # The input of each linear layer and what ReLU put out, which is saved twice.
    assert sorted(packed) == [(32, 64), (32, 128), (32, 128)]


def test_small_tensors_stay(packed: list[tuple[int, ...]]) -> None:
    model = net()
    offload_saved_tensors(model)
    gradients(model, 1)
    assert packed == []


def test_what_is_on_the_host_already_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)
    monkeypatch.setattr(offload, "OnHost", None)  # would fail if it were called
    model = net()
    offload_saved_tensors(model)
    gradients(model, 32)


def test_it_comes_off(packed: list[tuple[int, ...]]) -> None:
    model = net()
    offload_saved_tensors(model)
    assert remove_offload(model)
    assert not remove_offload(model)
    gradients(model, 32)
    assert packed == []


def test_an_expanded_tensor_is_not_made_larger(packed: list[tuple[int, ...]]) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp().expand(64, 64).sin()

    model = Wide()
    offload_saved_tensors(model)
    model(torch.ones(64, 1, requires_grad=True)).sum().backward()
    assert (64, 64) not in packed


def test_nothing_is_packed_without_gradients(packed: list[tuple[int, ...]]) -> None:
    model = net()
    offload_saved_tensors(model)
    with torch.no_grad():
        model(torch.ones(32, 64))
    assert packed == []


@pytest.mark.parametrize("strides", [(64, 1), (1, 32)])
def test_a_tensor_comes_back_as_it_went(strides: tuple[int, int]) -> None:
    tensor = torch.randn(64 * 32).as_strided((32, 64), strides)
    back = OnHost(tensor).restore()
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()
    assert back.device == tensor.device
