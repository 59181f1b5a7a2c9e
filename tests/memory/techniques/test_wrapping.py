from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expt.memory.techniques.wrapping import layer_of, unwrap, wrap


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Times:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.factor * forward(*args, **kwargs)


class Plus(Times):
    def __call__(self, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.factor + forward(*args, **kwargs)


def at_one(net: nn.Module) -> int:
    return int(net(torch.ones(())))


def test_the_last_layer_is_the_outermost() -> None:
    net = Net()
    wrap(net, "times", Times(3))
    wrap(net, "plus", Plus(10))
    assert at_one(net) == 16
    assert isinstance(layer_of(net, "times"), Times)
    assert layer_of(net, "other") is None


@pytest.mark.parametrize(("first", "left"), [("times", 12), ("plus", 6)])
def test_layers_come_off_in_any_order(first: str, left: int) -> None:
    net = Net()
    wrap(net, "times", Times(3))
    wrap(net, "plus", Plus(10))
    assert unwrap(net, first)
    assert at_one(net) == left
    assert not unwrap(net, first)
    assert unwrap(net, "plus" if first == "times" else "times")
    assert at_one(net) == 2
    assert "forward" not in vars(net)


def test_a_layer_of_the_same_name_is_replaced() -> None:
    net = Net()
    wrap(net, "times", Times(3))
    wrap(net, "times", Times(5))
    assert at_one(net) == 10


def test_a_forward_that_was_on_the_instance_stays() -> None:
    net = Net()
    net.forward = lambda x: x + 100  # type: ignore[method-assign]
    wrap(net, "times", Times(2))
    assert at_one(net) == 202
    unwrap(net, "times")
    assert at_one(net) == 101


def test_the_signature_is_still_the_models() -> None:
    net = Net()
    wrap(net, "times", Times(2))
    assert list(inspect.signature(net.forward).parameters) == ["x"]
