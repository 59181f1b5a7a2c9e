"""What each block of a model takes over time, and how the model would lie on several cards.

A block is what is numbered in a `ModuleList` or `Sequential` (``layers.3``), or a module outside of
one. `Blocks.split` lays consecutive blocks on one card each, so that the fullest is as empty as it
can be: weights, gradients, state, activations and what a pass makes on the way, of the blocks that
lie there. What has no module is counted where the step is at that moment. A tensor that passes from
one card to the next is counted once, and nothing is said about speed: the cards work one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from expt.memory.planning.trace import StorageTrace


@dataclass(frozen=True)
class Split:
    """A model on several cards: of each its peak in bytes, and its first block."""

    peak_bytes: tuple[int, ...]
    first_blocks: tuple[str, ...]

    @property
    def largest_bytes(self) -> int:
        """The peak of the fullest card."""
        return max(self.peak_bytes)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in the order of their forward pass.

    Args:
        names: of the blocks.
        series: bytes of each after every event of a step, int64 [blocks, events].

    """

    names: tuple[str, ...]
    series: np.ndarray

    @classmethod
    def of(cls, trace: StorageTrace, size: Callable[[int], int], start: int) -> Blocks:
        """Read a trace, from event `start` on; `size` is what is taken for a request."""
        order = _order(trace)
        rows = {name: row for row, name in enumerate(order)}
        series = np.zeros((len(order), len(trace.events) + 1), np.int64)
        shares = _shares(trace, rows)
        for at, (placed, change) in enumerate(_placed(trace, rows, size), start=1):
            if placed is None:  # the optimizer's step of all weights at once
                series[:, at] += np.rint(shares * change).astype(np.int64)
            else:
                series[placed, at] += change
        return cls(tuple(order), np.cumsum(series, axis=1)[:, start + 1 :])

    def split(self, cards: int) -> Split:
        """Lay the blocks on `cards` cards; blocks are not divided, so that some may stay empty."""
        low, high = 0, int(self.series.sum(axis=0).max(initial=0))
        starts = [0]
        while low < high:
            middle = (low + high) // 2
            found = self._filled(middle)
            if found is not None and len(found) <= cards:
                starts, high = found, middle
            else:
                low = middle + 1
        ends = [*starts[1:], len(self.names)]
        parts = [self.series[a:b].sum(axis=0) for a, b in zip(starts, ends, strict=True)]
        empty = cards - len(starts)
        return Split(
            (*(int(part.max(initial=0)) for part in parts), *[0] * empty),
            (*(self.names[at] for at in starts), *["(none)"] * empty),
        )

    def _filled(self, limit: int) -> list[int] | None:
        """Return where cards begin if each is filled up to a limit; None if a block exceeds it."""
        starts, held = [0], np.zeros(self.series.shape[1], np.int64)
        for row, one in enumerate(self.series):
            if one.max(initial=0) > limit:
                return None
            held = held + one
            if held.max(initial=0) > limit:
                starts.append(row)
                held = one
        return starts


def block_of(module: str) -> str:
    """Return the block that a module belongs to: its name up to the first number in it."""
    parts = module.split(".")
    for count, part in enumerate(parts, start=1):
        if part.isdigit():
            return ".".join(parts[:count])
    return module


def _order(trace: StorageTrace) -> list[str]:
    """Return the blocks, first those that made something in the forward pass, in that order."""
    storages = [storage for storage in trace.storages if storage.module]
    forward = [storage for storage in storages if storage.made and storage.phase == "forward"]
    found = dict.fromkeys(block_of(storage.module) for storage in (*forward, *storages))
    return list(found) or [""]


def _shares(trace: StorageTrace, rows: dict[str, int]) -> np.ndarray:
    """Return the part of all gradients that each block has."""
    found = np.zeros(len(rows))
    for storage in trace.storages:
        if storage.category == "gradients" and storage.module:
            found[rows[block_of(storage.module)]] += storage.bytes
    return found / found.sum() if found.any() else np.full(len(rows), 1 / len(rows))


def _placed(
    trace: StorageTrace, rows: dict[str, int], size: Callable[[int], int]
) -> Sequence[tuple[int | None, int]]:
    """Return the block and the bytes of every event; None is for all blocks."""
    found: list[tuple[int | None, int]] = []
    places: dict[int, int | None] = {}
    live: dict[int, int] = {}
    now = 0
    for number, change, phase in trace.events:
        storage, before = trace.storages[number], live.get(number, 0)
        live[number] = before + change
        if number not in places:
            if storage.module:
                places[number] = rows[block_of(storage.module)]
            elif trace.phases[phase] == "optimizer_step":
                places[number] = None
            else:
                places[number] = now
        place = places[number]
        # The forward pass is where something is made, the backward pass where something is let go.
        moves = (change > 0) == (trace.phases[phase] == "forward")
        if moves and place is not None and storage.module and storage.made:
            now = place
        found.append((place, size(before + change) - size(before)))
    return found
