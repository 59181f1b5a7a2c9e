from __future__ import annotations

import pytest
from torch import nn

from expt.memory.techniques.repeated_blocks import repeated_blocks
from expt.memory.techniques.techniques import Techniques, problems


class Residual(nn.Module):
    """A block of somebody's own."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Linear(4, 4)


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def names(model: nn.Module) -> list[str]:
    found = {id(part): name for name, part in model.named_modules()}
    return [found[id(block)] for block in repeated_blocks(model)]


def test_blocks_of_one_class_in_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Residual(), Residual(), nn.Linear(4, 4))
    assert names(model) == ["1", "2"]


def test_the_blocks_of_stages_and_not_the_stages() -> None:
    stages = [nn.Sequential(Residual(), Residual()) for _ in range(2)]
    assert names(nn.Sequential(*stages)) == ["0.0", "0.1", "1.0", "1.1"]


def test_sequences_in_a_sequence() -> None:
    assert names(nn.Sequential(pair(), pair(), nn.Flatten())) == ["0", "1"]


def test_a_class_of_its_own_comes_before_the_sequences_in_it() -> None:
    model = nn.Sequential(*(Residual(nn.Sequential(pair(), pair())) for _ in range(2)))
    assert names(model) == ["0", "1"]


def test_lists_come_first_and_what_lies_beside_them_is_found_too() -> None:
    model = nn.Module()
    model.stem = nn.Sequential(Residual(), Residual())
    model.layers = nn.ModuleList(Residual(nn.Sequential(pair(), pair())) for _ in range(2))
    assert names(model) == ["stem.0", "stem.1", "layers.0", "layers.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),  # they keep only their input
        nn.Sequential(Residual(), nn.Flatten()),  # not repeated
        nn.Linear(4, 4),
    ],
)
def test_what_is_no_block(model: nn.Module) -> None:
    assert repeated_blocks(model) == []
    (message,) = problems(model, Techniques(activation_checkpointing=True))
    for word in ("looked for", "ModuleList", "Sequential", "two or more", "set it to false"):
        assert word in message
