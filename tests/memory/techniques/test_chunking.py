from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expt.errors import ModelError
from expt.memory.measuring.ledger import StorageLedger
from expt.memory.techniques.batch_norm import batch_statistics
from expt.memory.techniques.chunking import chunk_forward, remove_chunking


class Net(nn.Module):
    """Notes the batch sizes it sees; returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 8))
        self.seen: list[int] = []

    def forward(self, x: Tensor, scale: Tensor, *, table: Tensor, power: int) -> dict[str, Tensor]:
        self.seen.append(len(x))
        assert table.shape == (3, 8)
        return {"y": self.layers(x) * scale, "z": (x**power,)}  # type: ignore[dict-item]


def arguments(batch: int) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
    torch.manual_seed(0)
    return (torch.randn(batch, 8), torch.randn(batch, 1)), {"table": torch.ones(3, 8), "power": 2}


def test_evaluation_runs_in_slices_and_training_does_not() -> None:
    net = Net()
    args, kwargs = arguments(10)
    whole = net(*args, **kwargs)
    chunk_forward(net, 4)
    net.seen.clear()
    training = net(*args, **kwargs)
    assert net.seen == [10]
    net.eval()
    sliced = net(*args, **kwargs)
    assert net.seen == [10, 3, 3, 2, 2]
    torch.testing.assert_close(sliced["y"], whole["y"])
    assert torch.equal(sliced["z"][0], whole["z"][0])
    assert torch.equal(training["y"], whole["y"])
    assert remove_chunking(net)
    net(*args, **kwargs)
    assert net.seen[-1] == 10


def test_training_in_slices_when_it_is_asked_for() -> None:
    net = Net()
    chunk_forward(net, 2, in_training=True)
    args, kwargs = arguments(7)
    net(*args, **kwargs)["y"].sum().backward()
    assert net.seen == [4, 3]
    assert net.layers[0].weight.grad is not None


def test_no_more_slices_than_samples() -> None:
    net = Net().eval()
    chunk_forward(net, 9)
    args, kwargs = arguments(2)
    net(*args, **kwargs)
    assert net.seen == [1, 1]
    args, kwargs = arguments(1)
    net(*args, **kwargs)
    assert net.seen == [1, 1, 1]


def test_the_peak_of_evaluation_is_a_slices() -> None:
    def peak(net: nn.Module) -> int:
        args, kwargs = arguments(512)
        with torch.no_grad(), StorageLedger() as ledger:
            net(*args, **kwargs)
        return ledger.peak_bytes

    net = Net().eval()
    plain = peak(net)
    chunk_forward(net, 8)
    assert peak(net) < plain / 4


def test_a_scalar_cannot_be_joined() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    net = Mean().eval()
    chunk_forward(net, 2)
    with pytest.raises(ModelError, match=r"memory\.forward_chunks"):
        net(torch.ones(4))


def test_batch_normalisation_is_found() -> None:
    assert batch_statistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == ["1"]
    assert batch_statistics(nn.LayerNorm(2)) == []
