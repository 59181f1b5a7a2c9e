"""Rows on disk: one memory-mapped array per feature, a row per sample, and which rows are there.

Rows are written with `pwrite`, so that a full disk is an error and not the end of the process, as
it would be through the mapping; several processes may write different rows. A row is marked once
it is on the disk. A store is made under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expt.files import write_json
from expt.job import Split
from expt.training.features.feature import Feature

META, MARKS = "features.json", "rows"
SPLITS: tuple[Split, ...] = ("train", "val", "test")
MARK_EVERY_SECONDS = 5.0
"""How many seconds of rows a power cut or a killed process costs at most: those not yet marked."""


class MissingRowError(LookupError):
    """A sample whose features are not there: it could not be read when they were made."""


class Rows:
    """The rows of a store, for reading; each process maps them itself.

    Args:
        folder: of the store.
        features: what a row has.
        sizes: samples of each split, whose rows follow each other.

    """

    def __init__(self, folder: Path, features: Sequence[Feature], sizes: Mapping[str, int]) -> None:
        self.folder, self.features, self.sizes = folder, list(features), dict(sizes)
        self._maps: dict[str, np.ndarray] | None = None

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(self.sizes.values())

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.count * sum(feature.nbytes for feature in self.features)

    def row(self, split: str, index: int) -> int:
        """Return the number of a sample's row."""
        names = list(self.sizes)
        return sum(self.sizes[name] for name in names[: names.index(split)]) + index

    def read(self, split: str, index: int) -> dict[str, Tensor]:
        """Return a sample's features, as they are kept.

        Raises:
            MissingRowError: there are none.

        """
        maps, row = self._mapped(), self.row(split, index)
        if not maps[MARKS][row]:
            raise MissingRowError("its features were not made, since it could not be read then")
        return {
            feature.name: torch.from_numpy(np.array(maps[feature.name][row]))
            for feature in self.features
        }

    def done(self) -> np.ndarray:
        """Return which rows are there now, a boolean for each.

        Read anew: over a network a mapping need not show what another host has written.
        """
        return np.fromfile(self.folder / MARKS, np.uint8).astype(bool)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": None}

    def _mapped(self) -> dict[str, np.ndarray]:
        if self._maps is None:
            maps = {one.name: np.load(_array(self.folder, one), "r") for one in self.features}
            marks = np.memmap(self.folder / MARKS, np.uint8, "r", shape=(self.count,))
            self._maps = {**maps, MARKS: marks}
        return self._maps


class RowWriter:
    """Writes rows into a store that was made by `create`."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._places: dict[str, tuple[int, int]] = {}
        self._unmarked: list[int] = []
        self._marked_at = time.monotonic()
        for one in rows.features:
            path = _array(rows.folder, one)
            array = np.load(path, "r")
            offset = int(array.offset)
            del array
            self._places[one.name] = (os.open(path, os.O_RDWR | os.O_CLOEXEC), offset)
        self._marks = os.open(rows.folder / MARKS, os.O_RDWR | os.O_CLOEXEC)

    def write(self, numbers: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Write the features [B, ...] of the rows with these numbers.

        Raises:
            OSError: the disk is full, or refuses.

        """
        for start, stop in _runs(numbers):
            for one in self._rows.features:
                file, offset = self._places[one.name]
                part = values[one.name][start:stop].cpu().contiguous().numpy()
                _write(file, part.tobytes(), offset + numbers[start] * one.nbytes)
        self._unmarked += numbers
        if time.monotonic() - self._marked_at > MARK_EVERY_SECONDS:
            self.mark()

    def mark(self) -> None:
        """Note the rows written so far as there, once they are on the disk."""
        for file, _ in self._places.values():
            os.fsync(file)
        for number in self._unmarked:
            os.pwrite(self._marks, b"\1", number)
        os.fsync(self._marks)
        self._unmarked, self._marked_at = [], time.monotonic()

    def close(self) -> None:
        """Close the files."""
        for file, _ in self._places.values():
            os.close(file)
        os.close(self._marks)
        self._places = {}


def create(
    folder: Path, features: Sequence[Feature], sizes: Mapping[str, int], about: Mapping[str, Any]
) -> Rows:
    """Make a store without rows, or go on with the same one that was begun; `about` is kept.

    Raises:
        OSError: the disk refuses.
        StorageError: it refuses the description.

    """
    earlier = opened(folder)
    if earlier is not None and (earlier.features, earlier.sizes) == (list(features), dict(sizes)):
        return earlier
    remove(folder)
    folder.mkdir(parents=True)
    rows = Rows(folder, features, sizes)
    for one in features:
        shape = (rows.count, *one.shape)
        kind = torch.empty(0, dtype=one.bits).numpy().dtype
        np.lib.format.open_memmap(_array(folder, one), "w+", kind, shape)
    with (folder / MARKS).open("wb") as file:
        file.truncate(rows.count)
    described = [one.as_dict() for one in features]
    write_json(folder / META, {"features": described, "sizes": dict(sizes), **about})
    return rows


def opened(folder: Path) -> Rows | None:
    """Return the store in a folder, None if there is none."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        features = [Feature.from_dict(stored) for stored in meta["features"]]
        return Rows(folder, features, meta["sizes"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def finish(part: Path, final: Path) -> Rows:
    """Give a store that is whole its name.

    Raises:
        OSError: the disk refuses.

    """
    part.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    rows = opened(final)
    assert rows is not None
    return rows


def remove(folder: Path) -> None:
    """Remove a store, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder that need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _array(folder: Path, feature: Feature) -> Path:
    return folder / f"{feature.name}.npy"


def _runs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yield the places in which numbers follow each other, as (first, last + 1)."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield start, place
            start = place


def _write(file: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
