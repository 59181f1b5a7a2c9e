"""The processes that train one model together: which one this is, and what they tell each other.

Everything that differs between one process and several asks a `OneRank` or a `SeveralRanks`, and
nothing else knows how many there are. Samples of a step or of a round of evaluation are shared out
in the order that one process would take them in (`Share`).

`SeveralRanks` needs `torch.distributed` to be joined (`expt.run.ranks.join`). Short messages go
between hosts (gloo), so that no device waits for them; tensors go between devices (NCCL on CUDA).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from expt.job import Batch

T = TypeVar("T")
Predict = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Share:
    """The samples of a process among those of all: `start` to `stop`; `largest` is of any process.

    A process for which there is none has the last sample, and is not to count it.
    """

    start: int
    stop: int
    largest: int
    counts: bool = True

    @classmethod
    def of(cls, count: int, rank: int, ranks: int) -> Share:
        """Return the share of a process in `count` samples, as even as can be."""
        size, longer = divmod(count, ranks)
        start = rank * size + min(rank, longer)
        stop = start + size + (rank < longer)
        largest = size + (longer > 0)
        if start == stop:
            return cls(count - 1, count, largest, counts=False)
        return cls(start, stop, largest)


def world() -> tuple[int, int]:
    """Return the number of this process and how many there are, by the environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class OneRank:
    """A process that trains by itself."""

    rank, count, first = 0, 1, True
    sharded = False

    def agree(self, signalled: bool, seconds: float) -> tuple[bool, float]:
        """Return whether any process was signalled, and the time that all go by."""
        return signalled, seconds

    def largest(self, values: Mapping[str, int]) -> dict[str, int]:
        """Return the largest of every value over the processes."""
        return dict(values)

    def gathered(self, value: T) -> list[T]:
        """Return what every process has, in their order."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes."""
        return make()

    def share(self, count: int) -> Share:
        """Return the share of this process in `count` samples."""
        return Share.of(count, self.rank, self.count)

    @contextmanager
    def following(self, work: Predict) -> Iterator[Predict]:
        """Give the first process `work`; the others do it with it, where all are needed for it."""
        yield work


class SeveralRanks(OneRank):
    """One of several processes.

    Args:
        device: where its tensors are.
        sharded: whether the model is shared out among them.

    """

    def __init__(self, device: torch.device, sharded: bool = False) -> None:
        import torch.distributed

        self._group = torch.distributed
        self.device, self.sharded = device, sharded
        self.rank, self.count = self._group.get_rank(), self._group.get_world_size()
        self.first = self.rank == 0

    def agree(self, signalled: bool, seconds: float) -> tuple[bool, float]:
        """Return whether any process was signalled, and how long the slowest has trained."""
        largest = self.maximum([float(signalled), seconds])
        return bool(largest[0]), largest[1]

    def largest(self, values: Mapping[str, int]) -> dict[str, int]:
        """Return the largest of every value over the processes."""
        found = self.maximum([float(value) for value in values.values()])
        return {name: int(value) for name, value in zip(values, found, strict=True)}

    def gathered(self, value: T) -> list[T]:
        """Return what every process has, in their order."""
        found: list[Any] = [None] * self.count
        self._group.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; the others wait."""
        found: list[Any] = [make() if self.first else None]
        self._group.broadcast_object_list(found, device=torch.device("cpu"))
        value: T = found[0]
        return value

    @contextmanager
    def following(self, work: Predict) -> Iterator[Predict]:
        """Give the first process `work`, which has all others do the same where that is needed.

        These come here to do it, and go on when the first is done.
        """
        if not self.sharded:
            yield work
            return
        if not self.first:
            while (batch := self.from_first(_nothing)) is not None:
                work(batch.each(lambda value: value.to(self.device)))
            yield work
            return

        def together(batch: Batch) -> Tensor:
            self.from_first(lambda: batch.each(Tensor.cpu))
            return work(batch)

        try:
            yield together
        finally:
            self.from_first(_nothing)

    def maximum(self, values: list[float]) -> list[float]:
        """Return the largest of every value over the processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self._group.all_reduce(tensor, op=self._group.ReduceOp.MAX)
        return tensor.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        self._group.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over the processes, in place; return what waits for it."""
        return self._group.all_reduce(tensor, async_op=True).wait  # type: ignore[no-any-return]

    def begin_alike(self, model: nn.Module, seed: int) -> None:
        """Give all processes the first one's model, and each random numbers of its own."""
        if not self.sharded:
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    self._group.broadcast(tensor, src=0)
        if not self.first:  # what dropout draws is to differ
            own = int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0])
            random.seed(own)
            np.random.seed(own)
            torch.manual_seed(own)

    def collect(self, value: Any, interrupted: bool) -> Iterator[Any] | None:
        """Give, on the first process, what all have, one after the other; None: interrupted.

        Args:
            value: tensors on the device, in tuples, lists and dicts; None has nothing to give.
            interrupted: whether a signal came here.

        """
        leaves, spec = tree_flatten(value)
        structure = tree_unflatten(range(len(leaves)), spec)
        shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
        told = self.gathered((interrupted, structure, shapes))
        if any(stop for stop, _, _ in told):
            return None
        if not self.first:
            for leaf in leaves:
                self._group.send(_bytes(leaf), dst=0)
            return iter(())
        others = (self._received(rank, told[rank]) for rank in range(1, self.count))
        return chain((value,), others)

    def _received(self, rank: int, told: tuple[bool, Any, list[Any]]) -> Any:
        _, structure, shapes = told
        leaves = []
        for shape, dtype in shapes:
            leaf = torch.empty(shape, dtype=dtype, device=self.device)
            self._group.recv(_bytes(leaf), src=rank)
            leaves.append(leaf)
        return tree_map(leaves.__getitem__, structure)


def _nothing() -> Batch | None:
    return None


def _bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes [N], of a copy where they are not in one piece."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def is_shared_out(tensor: Tensor) -> bool:
    """Tell whether this process has only a part of a tensor, as a DTensor of torch's."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, which have to ask for it together."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]
