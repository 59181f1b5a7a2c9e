from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from expt.training.losses import MOST_PENDING, LossReader, Reading

CPU = torch.device("cpu")


class Late:
    """A copy that arrives when it is told to."""

    def __init__(self) -> None:
        self.there = False
        self.waited = 0

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.waited += not self.there
        self.there = True


@pytest.fixture
def arrivals() -> list[Late]:
    return []


@pytest.fixture
def reader(arrivals: list[Late]) -> LossReader:
    def fetch(tensor: Tensor) -> tuple[Tensor, Late]:
        arrivals.append(Late())
        return tensor.clone(), arrivals[-1]

    return LossReader(CPU, fetch)


def test_on_the_host_an_answer_is_there_at_once() -> None:
    reader = LossReader(CPU)
    reader.ask(7, torch.tensor(1.5), torch.tensor(30))
    assert reader.readings() == [Reading(7, 1.5, True)]
    assert reader.readings() == []


def test_nothing_is_waited_for_unless_asked_to(reader: LossReader, arrivals: list[Late]) -> None:
    for step in (50, 100):
        reader.ask(step, torch.tensor(float(step)), torch.tensor(1.0))
    assert reader.readings() == []
    arrivals[0].there = True
    assert [reading.step for reading in reader.readings()] == [50]
    assert [one.waited for one in arrivals] == [0, 0]
    assert [reading.step for reading in reader.readings(wait=True)] == [100]
    assert [one.waited for one in arrivals] == [0, 1]


def test_the_host_is_never_far_ahead(reader: LossReader, arrivals: list[Late]) -> None:
    for step in range(MOST_PENDING + 2):
        reader.ask(step, torch.tensor(float(step)), torch.tensor(1.0))
    assert [reading.step for reading in reader.readings()] == [0, 1]
    assert [one.waited for one in arrivals] == [1, 1, 0, 0]


def test_later_answers_do_not_overtake_earlier_ones(
    reader: LossReader, arrivals: list[Late]
) -> None:
    reader.ask(1, torch.tensor(0.0), torch.tensor(0.0))
    reader.ask(2, torch.tensor(0.0), torch.tensor(0.0))
    arrivals[1].there = True
    assert reader.readings() == []


def test_a_value_is_that_of_its_step_though_the_tensor_changes_after(reader: LossReader) -> None:
    loss = torch.tensor(1.0)
    reader.ask(1, loss, loss)
    loss.fill_(2.0)
    assert reader.readings(wait=True) == [Reading(1, 1.0, True)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_seen(bad: float) -> None:
    reader = LossReader(CPU)
    reader.ask(1, torch.tensor(1.0), torch.tensor(bad))
    assert [reading.finite for reading in reader.readings()] == [False]


def test_what_is_forgotten_is_never_answered(reader: LossReader) -> None:
    reader.ask(1, torch.tensor(1.0), torch.tensor(1.0))
    reader.forget()
    assert reader.readings(wait=True) == []
