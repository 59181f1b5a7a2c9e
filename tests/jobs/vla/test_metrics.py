from __future__ import annotations

import math

import pytest
import torch

from expt.errors import ModelError
from expt.job import Batch
from expt.jobs.vla.metrics import ActionErrors, action_metrics, keys_of

STD = torch.tensor([2.0, 0.5])
TARGET = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [math.nan, math.nan]]])


def errors(prediction: torch.Tensor, samples: int = 1, parts: int = 1) -> dict[str, float]:
    found = ActionErrors(STD, ["x", "grip"], samples)
    size = len(TARGET) // parts
    for first in range(0, len(TARGET), size):
        part = slice(first, first + size)
        found.update(prediction[part], Batch({}, TARGET[part]))
    return found.compute()


def test_errors_are_in_the_robots_units_and_what_is_unknown_does_not_count():
    prediction = TARGET.nan_to_num(nan=50.0) + torch.tensor([1.0, -2.0])
    found = errors(prediction)
    assert found == {"l1": 1.5, "mse": 2.5, "l1_x": 2.0, "l1_grip": 1.0}
    assert errors(prediction, parts=2) == found
    assert set(found) == {metric.name for metric in action_metrics(["x", "grip"], 1)}


def test_the_first_of_several_is_chosen_and_the_best_is_told_beside_it():
    right = TARGET.nan_to_num()
    wrong = right + 1.0
    several = torch.stack([wrong, right], dim=1)
    several[1] = several[1].flip(0)  # of the second sample the first is the right one
    found = errors(several, samples=2)
    assert found["l1_x"] == pytest.approx(2 * 2 / 3)
    assert found["best_l1"] == 0
    assert errors(torch.stack([right, wrong], dim=1), samples=2)["l1"] == 0
    assert "best_l1" in {metric.name for metric in action_metrics(["x", "grip"], 2)}


def test_names_become_keys():
    names = ["Joint 1.pos", "joint_1_pos", "", "é/x"]
    assert keys_of(names) == ["joint_1_pos", "joint_1_pos_1", "2", "x"]
    assert keys_of(["a", "a_2", "a"]) == ["a", "a_2", "a_3"]


def test_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"the model returned \[2, 5, 2\]; expected \[2, 2, 2\]"):
        errors(torch.zeros(2, 5, 2))
