"""Buffers that a block writes to in its forward pass, for a block that is run twice.

A counter, the averages of a codebook or the vectors of spectral norm's power iteration would be
moved on twice where a block is computed again, and what is computed again would follow from other
values than the first time. So the block is computed again with its buffers as they were before,
and has those from afterwards again then.

What a buffer held before is known only if it was copied. Which ones to copy is learnt: runs are
watched until one writes to no buffer that is not known yet, so that a block that writes to none is
watched once and copies nothing. A buffer that is written to for the first time later than that, or
by compiled code, is moved on once, too; that one time the block is computed again from the later
value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Place = tuple[nn.Module, str]
"""A module, and the name of a buffer of its own."""
Held = Tensor | None
"""What lies at a place: some buffers are made when they are first needed."""


class WrittenBuffers:
    """What is known of the buffers of one block.

    Args:
        block: whose forward pass is run twice.
        apart: modules whose own buffers are left alone.

    """

    def __init__(self, block: nn.Module, apart: Collection[nn.Module]) -> None:
        others = (part for part in block.modules() if part not in apart)
        self._places: list[Place] = [(part, name) for part in others for name in part._buffers]
        self._block = block
        self._known: set[int] = set()
        self._settled: set[bool] = set()  # whether in training, and whether not

    def __bool__(self) -> bool:
        """Tell whether there are buffers at all."""
        return bool(self._places)

    def run(self) -> Run:
        """Return what goes around the next run and its repetitions."""
        training = self._block.training

        def learn(written: set[int]) -> None:
            (self._settled.add if written <= self._known else self._settled.discard)(training)
            self._known |= written

        return Run(self._places, self._known, training not in self._settled, learn)


class Run:
    """One run of a block: `first` goes around it, `rewind` and `forward` around a repetition.

    Args:
        places: of all buffers.
        known: numbers of the places that are copied.
        watched: look for others.
        learn: is told the numbers of the places that were written to.

    """

    def __init__(
        self,
        places: Sequence[Place],
        known: Collection[int],
        watched: bool,
        learn: Callable[[set[int]], None],
    ) -> None:
        self._places, self._known = places, known
        self._watched, self._learn = watched, learn
        self._before: dict[int, Held] = {}  # of the places that were written to
        self._later: dict[int, Held] = {}  # while the block is run again

    @contextmanager
    def first(self) -> Iterator[None]:
        """Note which buffers are written to inside, and what they held."""
        held = [part._buffers.get(name) for part, name in self._places]
        versions = [_version(buffer) for buffer in held]
        copies = _Copies()
        for number in self._known:
            copies.take(held[number])
        if self._watched:
            with _Watch(held, copies):
                yield
        else:
            yield
        for number, before in enumerate(held):
            if _version(before) != versions[number]:
                self._before[number] = copies.take(before)
            elif self._at(number) is not before:
                self._before[number] = before
        self._learn(set(self._before))

    def rewind(self) -> None:
        """Give the buffers the values of before; of the copies, since there may be another."""
        copies = _Copies()
        for number, before in self._before.items():
            self._later[number] = self._at(number)
            self._put(number, copies.take(before))

    def forward(self) -> None:
        """Give the buffers those values again that they had when they were rewound."""
        while self._later:
            self._put(*self._later.popitem())

    def _at(self, number: int) -> Held:
        part, name = self._places[number]
        return part._buffers.get(name)

    def _put(self, number: int, value: Held) -> None:
        part, name = self._places[number]
        part._buffers[name] = value


class _Copies:
    """One copy of each tensor, which may lie at several places."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, tensor: Held) -> Held:
        """Return what a tensor held when it was first asked for."""
        if tensor is None:
            return None
        if id(tensor) not in self._of:
            self._of[id(tensor)] = tensor, tensor.detach().clone()
        return self._of[id(tensor)][1]


class _Watch(TorchDispatchMode):
    """Copies a buffer just before an operator writes to it.

    What was compiled runs compiled, and its writes are not seen: see the top of this file.
    """

    supports_higher_order_operators = True

    def __init__(self, held: Sequence[Held], copies: _Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, list[Tensor]] = {}
        for buffer in held:
            if buffer is not None and buffer.layout is torch.strided:
                self._held.setdefault(_storage(buffer), []).append(buffer)
        self._copies = copies

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let torch compile inside, as it does when the block is computed again."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # an operator of higher order has none
        if schema is not None and schema.is_mutable:
            for value in _targets(func, args, kwargs):
                for buffer in self._held.get(_storage(value), ()):
                    self._copies.take(buffer)
        return func(*args, **kwargs)


def _targets(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for value in tree_iter(given):
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    yield value


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _version(buffer: Held) -> int:
    """Return how often a tensor was written to, which is not counted of one made for inference."""
    return 0 if buffer is None or buffer.is_inference() else buffer._version
