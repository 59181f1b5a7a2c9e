"""Random numbers for blocks that are run twice inside a step captured as a CUDA graph.

A checkpointed block has to draw in the backward pass what it drew in the forward pass. Outside a
graph the generator's state is read and set for that, which no capture allows. Inside one, every
block gets two generator states of its own with the same seed: the forward pass draws from one,
the repetition from the other. Each replay moves both on by the same amount, so that they stay
alike for good. The numbers are others than those of eager steps, and just as random.

Source of the way to swap states inside a capture: torch's own compiled checkpointing
(`torch/_functorch/_aot_autograd/runtime_wrappers.py`, `initialize_rng_states`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

Pair = tuple[AbstractContextManager[object], AbstractContextManager[object]]
"""Contexts of a block's forward pass, and of its repetition."""


class BlockCounter:
    """Counts the blocks that a step checkpoints, and changes nothing."""

    def __init__(self) -> None:
        self.blocks = 0

    def pair(self) -> Pair | None:
        """Count one block; None: it is to keep its random state as usual."""
        self.blocks += 1
        return None


class BlockRandomness:
    """Hands every checkpointed block of a captured step its two generator states.

    Args:
        generator: the device's default generator, `torch.cuda.default_generators[index]`.
        blocks: that a step checkpoints, micro-batches counted one by one.
        register: makes a state known to the graph (`CUDAGraph.register_generator_state`); it has
            to happen before the capture begins.
        seed: of this capture.

    """

    def __init__(
        self,
        generator: torch.Generator,
        blocks: int,
        register: Callable[[torch.Generator], object],
        seed: int,
    ) -> None:
        self._generator = generator
        own = torch.Generator().manual_seed(seed)
        seeds = torch.randint(0, 2**63 - 1, (blocks,), generator=own).tolist()
        self._pairs = [
            tuple(generator.clone_state().manual_seed(one) for _ in range(2)) for one in seeds
        ]
        for state in (state for pair in self._pairs for state in pair):
            register(state)
        self._next = 0

    def pair(self) -> Pair:
        """Return the next block's contexts."""
        assert self._next < len(self._pairs), "a captured step has the blocks that were counted"
        first, second = self._pairs[self._next]
        self._next += 1
        return self._drawing_from(first), self._drawing_from(second)

    @contextmanager
    def _drawing_from(self, state: torch.Generator) -> Iterator[None]:
        before = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(state)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(before)


_current: BlockCounter | BlockRandomness | None = None


@contextmanager
def block_randomness(source: BlockCounter | BlockRandomness) -> Iterator[None]:
    """Let checkpointed blocks ask `source` for their contexts inside."""
    global _current
    before, _current = _current, source
    try:
        yield
    finally:
        _current = before


def next_pair() -> Pair | None:
    """Return the contexts of a block that is about to run; None outside a capture."""
    return None if _current is None else _current.pair()
