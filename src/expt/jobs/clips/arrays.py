"""Clips that are NumPy arrays: heat maps, optical flow, or frames that something else decoded.

Letters: `n` frames, `H` x `W` pixels, `C` channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expt.errors import DataError, first_line

ARRAY_SUFFIX = ".npy"
"""Of a file with one array."""
FEW = 4
"""Channels of a picture at most; where the second axis is as short, channels come first."""


def open_array(path: Path) -> np.ndarray:
    """Return the frames of a file as they are on the disk, uint8 [n,H,W,C]; none is read yet.

    Raises:
        DataError: the file cannot be read, holds another kind of array, or no frame at all.

    """
    try:
        found: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header is read as Python, and fails in many ways
        raise DataError(f"{path} cannot be read as an array: {first_line(error)}") from error
    wanted = f"{path} must be an array [frames, height, width, channels] of uint8, from 0 to 255"
    if found.ndim != 4 or found.dtype != np.uint8:
        raise DataError(f"{wanted}; it is {list(found.shape)} of {found.dtype}")
    if 0 in found.shape:
        raise DataError(f"{path} holds no frames: its shape is {list(found.shape)}")
    if found.shape[1] <= FEW < min(found.shape[2:]):
        raise DataError(f"{wanted}; it is {list(found.shape)}: channels come last")
    return found


def read_array(path: Path, numbers: Sequence[int], short_side: int | None) -> np.ndarray:
    """Return some frames of a file, uint8 [n,H,W,C], their shorter side scaled to `short_side`.

    Raises:
        DataError: it holds no array of frames, or fewer than asked for.

    """
    frames = open_array(path)
    if numbers[-1] >= len(frames):
        raise DataError(f"{path} has {len(frames)} frames; frame {numbers[-1]} was asked for")
    chosen: np.ndarray = frames[list(numbers)]
    height, width, channels = chosen.shape[1:]
    if short_side is None or short_side == min(height, width):
        return np.ascontiguousarray(chosen)
    factor = short_side / min(height, width)
    rows, columns = (_averaging(side, max(round(side * factor), 1)) for side in (height, width))
    scaled = np.empty((len(chosen), len(rows), len(columns), channels), np.uint8)
    for number, frame in enumerate(chosen):  # one at a time, since they are floating here
        flat = rows @ frame.reshape(height, width * channels).astype(np.float32)
        scaled[number] = np.rint(columns @ flat.reshape(len(rows), width, channels))
    return scaled


def digest(path: Path) -> str:
    """Return a short hash of a file's first, middle and last frame."""
    frames = open_array(path)
    some = frames[[0, len(frames) // 2, len(frames) - 1]]
    return hashlib.sha256(some.tobytes()).hexdigest()[:16]


def _averaging(old: int, new: int) -> np.ndarray:
    """Return a matrix [new, old] whose rows average what each new pixel covers of the old ones."""
    edges = np.arange(new + 1) * old / new
    first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int)
    places = np.arange(old)
    covered = (places >= first[:, None]) & (places < last[:, None])
    found: np.ndarray = (covered / covered.sum(axis=1, keepdims=True)).astype(np.float32)
    return found
