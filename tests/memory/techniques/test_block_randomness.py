"""Checkpointed blocks inside a capture, with generator states that are counted in software."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expt.memory.techniques.block_randomness import BlockCounter, BlockRandomness, block_randomness
from expt.memory.techniques.checkpointing import checkpoint_activations


class State:
    """A generator state: a seed, and how often it was drawn from."""

    def __init__(self, seed: int = 0, drawn: int = 0) -> None:
        self.seed, self.drawn = seed, drawn

    def manual_seed(self, seed: int) -> State:
        self.seed, self.drawn = seed, 0
        return self


class Generator:
    """Has the methods of a CUDA generator that `BlockRandomness` uses."""

    def __init__(self) -> None:
        self.state = State()

    def clone_state(self) -> State:
        return State(self.state.seed, self.state.drawn)

    def graphsafe_get_state(self) -> State:
        return self.state

    def graphsafe_set_state(self, state: State) -> None:
        self.state = state


class Draw(nn.Module):
    """Multiplies by a number that follows from the generator's state alone."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        state = self.generator.state
        state.drawn += 1
        self.seen.append((state.seed, state.drawn))
        return x * (1.0 + (state.seed % 1000) / 1000 + state.drawn)


class Net(nn.Module):
    """Blocks that draw in the middle, and one that draws last, after all that backward needs."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.draws = [Draw(generator) for _ in range(3)]
        first, second, third = self.draws
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(2, 2), first, nn.Tanh()),
                nn.Sequential(nn.Linear(2, 2), second, nn.Tanh()),
                nn.Sequential(nn.Linear(2, 2), nn.Tanh(), third),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("mode", [True, "selective"])
def test_the_repetition_draws_what_the_forward_pass_drew(mode: Any) -> None:
    generator = Generator()
    net = Net(generator)
    checkpoint_activations(net, mode)
    registered: list[Any] = []
    source: Any = BlockRandomness(generator, 3, registered.append, seed=5)  # type: ignore[arg-type]
    with block_randomness(source):
        net(torch.ones(4, 2, requires_grad=True)).sum().backward()
    assert len(registered) == 6
    for draw in net.draws:
        first, second = draw.seen
        assert first == second
    assert len({draw.seen[0] for draw in net.draws}) == 3, "every block has numbers of its own"
    assert generator.state.drawn == 0, "the generator itself is where it was"
    # Replays move both states of a block on alike only if each drew as often.
    assert {state.drawn for state in registered} == {1}


def test_the_seed_decides() -> None:
    def seeds(seed: int) -> list[int]:
        states: list[Any] = []
        BlockRandomness(Generator(), 2, states.append, seed)  # type: ignore[arg-type]
        return [state.seed for state in states]

    assert seeds(1) == seeds(1) != seeds(2)
    assert seeds(1)[0] == seeds(1)[1] != seeds(1)[2]


def test_blocks_are_counted_and_draw_as_usual() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)])
    checkpoint_activations(net)
    x = torch.ones(8, 4, requires_grad=True)
    counter = BlockCounter()
    with block_randomness(counter):
        y = x
        for block in net:
            y = block(y)
        y.sum().backward()
    assert counter.blocks == 2
    assert x.grad is not None
    # A mask drawn anew in the repetition would let gradients through where outputs are zero.
    dead = (y == 0).all(dim=1)
    assert (x.grad[dead] == 0).all()


def test_more_blocks_than_were_counted_is_a_fault() -> None:
    source = BlockRandomness(Generator(), 1, lambda state: None, 0)  # type: ignore[arg-type]
    source.pair()
    with pytest.raises(AssertionError, match="counted"):
        source.pair()
