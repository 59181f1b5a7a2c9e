from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from expt.errors import ConfigError
from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adafactor": (torch.optim.Adafactor, {}),
    "asgd": (torch.optim.ASGD, {}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Net(nn.Module):
    """Two groups of weights, one weight used twice, one never, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.idle = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(x).relu()) * self.frozen)


def optimizer_for(net: Net, name: str) -> torch.optim.Optimizer:
    kind, arguments = OPTIMIZERS[name]
    groups = [
        {"params": [*net.shared.parameters(), net.idle, net.frozen], "lr": 0.05},
        {"params": list(net.last.parameters()), "lr": 0.01},
    ]
    return kind(groups, **arguments)  # type: ignore[no-any-return]


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train with a rate that falls, as a schedule would set it."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@every_optimizer
def test_it_is_the_same_training(name: str) -> None:
    one, other = Net(), Net()
    expected = train(one, optimizer_for(one, name), 6)
    optimizer = OptimizerInBackward(optimizer_for(other, name))
    assert train(other, optimizer, 6) == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0]
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.grad is None


@every_optimizer
def test_its_state_goes_on_in_an_ordinary_run_and_the_other_way(name: str) -> None:
    whole = Net()
    expected = train(whole, optimizer_for(whole, name), 6)
    for wrap_first in (True, False):
        net = Net()
        first = optimizer_for(net, name)
        losses = train(net, OptimizerInBackward(first) if wrap_first else first, 3)
        file = io.BytesIO()
        torch.save((net.state_dict(), first.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        resumed = Net()
        resumed.load_state_dict(weights)
        second = optimizer_for(resumed, name)
        if not wrap_first:
            second = OptimizerInBackward(second)
        second.load_state_dict(state)
        losses += train(resumed, second, 3)
        assert losses == pytest.approx(expected, rel=1e-6)


def test_it_works_as_fabric_sets_it_up() -> None:
    plain, net = Net(), Net()
    expected = train(plain, optimizer_for(plain, "adamw"), 4)
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = optimizer_for(net, "adamw")
    model, optimizer = fabric.setup(net, OptimizerInBackward(inner))
    assert train(model, optimizer, 3) == pytest.approx(expected[:3], rel=1e-6)
    assert optimizer.param_groups is inner.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is inner.param_groups, "a rate set later still acts"
    assert train(model, optimizer, 1) == pytest.approx(expected[3:], rel=1e-6)


def test_hooks_stay_when_the_model_moves() -> None:
    net = Net()
    optimizer = OptimizerInBackward(optimizer_for(net, "sgd"))
    net.to(torch.float64)  # replaces the weights' data, as a move to a device does
    before = net.last.weight.detach().clone()
    net(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
    assert not torch.equal(net.last.weight, before)
    assert optimizer.weights_stepped == 4  # neither the idle nor the frozen one


def test_it_says_whether_a_step_is_under_way() -> None:
    net = Net()
    optimizer = OptimizerInBackward(optimizer_for(net, "sgd"))
    assert optimizer.weights_stepped == 0
    net(torch.ones(2, 8)).sum().backward()
    assert optimizer.weights_stepped == 4
    optimizer.step()
    assert optimizer.weights_stepped == 0


def test_removed_it_is_an_ordinary_optimizer_again() -> None:
    net = Net()
    inner = optimizer_for(net, "sgd")
    optimizer = OptimizerInBackward(inner)
    assert optimizer.remove() is inner
    before = net.last.weight.detach().clone()
    net(torch.ones(2, 8)).sum().backward()
    assert torch.equal(net.last.weight, before)
    assert net.last.weight.grad is not None
    inner.step()
    assert not torch.equal(net.last.weight, before)


def test_an_error_in_a_step_leaves_the_groups_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    inner = optimizer_for(net, "sgd")
    optimizer = OptimizerInBackward(inner)

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(inner, "step", fail)
    groups = inner.param_groups
    with pytest.raises(RuntimeError, match="out of memory"):
        net(torch.ones(2, 8)).sum().backward()
    assert optimizer.param_groups is inner.param_groups is groups


def test_an_optimizer_that_counts_steps_in_its_groups_is_refused() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                group["steps_taken"] = group.get("steps_taken", 0) + 1

    net = Net()
    optimizer = OptimizerInBackward(Counting(net.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"Counting counts steps.*steps_taken"):
        net(torch.ones(2, 8)).sum().backward()
    assert optimizer.weights_stepped == 0


def test_weights_and_optimizer_are_freed_when_nobody_uses_them() -> None:
    """Python's collector does not see what a hook of a weight holds."""
    net = Net()
    optimizer = OptimizerInBackward(optimizer_for(net, "sgd"))
    train(net, optimizer, 2)
    left = [weakref.ref(net.last.weight), weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert [one() for one in left] == [None, None]


def test_a_group_added_later_is_refused_not_forgotten() -> None:
    optimizer = OptimizerInBackward(optimizer_for(Net(), "sgd"))
    with pytest.raises(TypeError, match="wrap that again"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
