"""Averaged weights: the formula, the exchange, and what a resume takes over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.training.average import NoAverage, WeightAverage, average_for

FAR = 100_000
"""A step from which on the decay is the one asked for."""


def walk(model: nn.Module, steps: int, average: NoAverage) -> list[torch.Tensor]:
    seen = []
    for step in range(steps):
        with torch.no_grad():
            model.weight += float(step + 1)
        average.update(FAR + step)
        seen.append(model.weight.detach().clone())
    return seen


def test_the_average_is_the_exponential_one():
    model = nn.Linear(2, 2)
    expected = model.weight.detach().clone()
    average = WeightAverage(model, 0.9)
    for weight in walk(model, 5, average):
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(average.state_dict()["weight"], expected)


def test_the_first_steps_are_followed_closely():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9999)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    average.update(0)
    torch.testing.assert_close(average.state_dict()["weight"], before + 0.9)


def test_inside_the_model_has_the_averaged_weights_and_afterwards_its_own():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    walk(model, 3, average)
    own = model.weight.detach().clone()
    averaged = average.state_dict()["weight"].clone()
    with pytest.raises(KeyboardInterrupt), average.exchanged():
        torch.testing.assert_close(model.weight, averaged)
        assert not torch.equal(model.weight, own)
        raise KeyboardInterrupt
    torch.testing.assert_close(model.weight.detach(), own)
    torch.testing.assert_close(average.state_dict()["weight"], averaged)


def test_what_was_saved_is_taken_over():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    walk(model, 3, average)
    other = WeightAverage(nn.Linear(2, 2), 0.5)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other.state_dict()["weight"], average.state_dict()["weight"])


def test_a_checkpoint_without_averages_begins_with_the_weights():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(7.0)
    average.load_state_dict({})
    assert torch.equal(average.state_dict()["weight"], model.weight)


def test_frozen_parameters_are_not_copied():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert set(WeightAverage(model, 0.5).state_dict()) == {"weight"}


def test_without_a_decay_nothing_is_kept():
    assert average_for(nn.Linear(2, 2), None).state_dict() == {}
