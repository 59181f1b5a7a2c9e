"""Batch normalisation: what a split batch does to it, and what keeps a step exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from expt.memory.recovery.undo import StepUndo
from expt.memory.techniques.batch_norm import BatchNorm, batch_statistics, set_batch_norm
from expt.memory.techniques.techniques import Techniques, problems
from expt.training.average import WeightAverage

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with batch normalisation, one in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).mean(dim=(2, 3))))


def made(mode: BatchNorm) -> Net:
    torch.manual_seed(0)
    net = Net()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):  # as if it had been trained
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    set_batch_norm(net, mode)
    return net.train()


def gradient(net: Net, parts: int) -> Tensor:
    for part in X.tensor_split(parts):
        (net(part).square().sum() / len(X)).backward()
    found = torch.cat([weight.grad.flatten() for weight in net.parameters()])
    net.zero_grad()
    return found


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("mode", ["group", "frozen"])
def test_a_batch_can_be_cut_with_group_and_frozen_statistics(mode: BatchNorm, parts: int) -> None:
    net = made(mode)
    torch.testing.assert_close(gradient(net, parts), gradient(net, 1), rtol=1e-4, atol=1e-5)
    assert batch_statistics(net) == []


def test_a_batch_cannot_be_cut_with_its_own_statistics() -> None:
    net = made("batch")
    whole, cut = gradient(net, 1), gradient(net, 2)
    assert float((cut - whole).norm() / whole.norm()) > 0.05
    assert batch_statistics(net) == ["first.1", "norm"]


def test_frozen_layers_stay_so_and_their_statistics_as_they_are() -> None:
    net = made("frozen")
    before = copy.deepcopy(net.state_dict())
    net.eval()
    net.train()
    assert net.training and not net.norm.training
    gradient(net, 2)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_group_keeps_the_weights_and_needs_no_batch() -> None:
    plain, net = made("batch"), made("batch")
    weights = [id(weight) for weight in net.parameters()]
    assert set_batch_norm(net, "group") == 2
    assert [id(weight) for weight in net.parameters()] == weights
    assert isinstance(net.norm, nn.GroupNorm)
    assert (net.first[1].num_groups, net.norm.num_groups) == (8, 1)
    assert {name for name, _ in net.named_parameters()} == {n for n, _ in plain.named_parameters()}
    torch.testing.assert_close(net(X)[:1], net(X[:1]), rtol=1e-4, atol=1e-5)


def test_chunks_in_training_are_refused_only_where_they_would_change_something() -> None:
    chunked = Techniques(forward_chunks=2, forward_chunks_in_training=True)
    (said,) = problems(made("batch"), chunked)
    assert "memory.batch_norm=group or frozen" in said
    assert problems(made("group"), chunked) == problems(made("frozen"), chunked) == []


def test_a_step_that_is_redone_updates_running_statistics_once(monkeypatch) -> None:
    monkeypatch.setattr("expt.memory.recovery.undo.SMALL_BYTES", 0)  # as if they were large
    net = made("batch")
    undo = StepUndo(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.device("cpu"))
    before = copy.deepcopy(net.state_dict())
    undo.note()
    net(X)
    assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])
    assert undo.undo("forward")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_averaged_weights_have_averaged_statistics() -> None:
    net = made("batch")
    average = WeightAverage(net, decay=0.5)
    first = net.norm.running_mean.clone()
    net(X)
    second = net.norm.running_mean.clone()
    average.update(step=100)
    with average.exchanged():
        torch.testing.assert_close(net.norm.running_mean, (first + second) / 2)
        assert net.norm.num_batches_tracked == 1
    assert torch.equal(net.norm.running_mean, second)


def test_other_buffers_are_not_averaged() -> None:
    net = made("batch")
    net.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    average = WeightAverage(net, decay=0.5)
    before = net.mask.clone()
    average.update(step=100)
    with average.exchanged():
        assert torch.equal(net.mask, before)
