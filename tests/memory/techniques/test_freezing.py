"""Weights are frozen and trained by name; what a frozen one had in the optimizer is dropped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.errors import ConfigError
from expt.memory.techniques.freezing import ever_trained, freeze_others, train_only
from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward


def net() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model["head"](model["body"](torch.ones(4, 3))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("in_backward", [False, True])
def test_state_is_kept_made_and_dropped_with_the_stage(in_backward: bool) -> None:
    model = net()
    freeze_others(model, {"a": ["head.*"], "b": ["*"]})
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    if in_backward:
        optimizer = OptimizerInBackward(optimizer)
    train_only(model, ["head.*"], optimizer)
    body, head = model["body"].weight, model["head"].weight
    before = body.detach().clone()
    step(model, optimizer)
    assert set(optimizer.state) == set(model["head"].parameters())
    assert torch.equal(body, before), "a frozen weight does not even decay"
    train_only(model, ["*"], optimizer)
    step(model, optimizer)
    assert float(optimizer.state[head]["step"]) == 2
    assert float(optimizer.state[body]["step"]) == 1
    train_only(model, ["body.*"], optimizer)
    assert set(optimizer.state) == set(model["body"].parameters())
    step(model, optimizer)
    assert float(optimizer.state[body]["step"]) == 2
    assert ever_trained(model) == {name for name, _ in model.named_parameters()}


def test_a_pattern_that_matches_nothing_is_said_with_names_that_are_near() -> None:
    with pytest.raises(ConfigError, match=r"stage two: 'hed\.\*' matches no weight.*head") as found:
        freeze_others(net(), {"stage one": ["body.*"], "stage two": ["hed.*"], "three": []})
    assert len(found.value.problems) == 2


def test_one_stage_marks_nothing() -> None:
    model = net()
    freeze_others(model, {"a": ["head.*"]})
    assert ever_trained(model) == {"head.weight", "head.bias"}
    train_only(model, ["body.*"])
    assert ever_trained(model) == {"body.weight", "body.bias"}
