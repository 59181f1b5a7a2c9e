"""Clips that are NumPy arrays: heat maps, optical flow, or frames that something else decoded.

Letters: `n` frames, `H` x `W` pixels, `C` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from expt.errors import DataError, first_line

SUFFIX = ".npy"
"""Of a file with one array."""


def open_array(path: Path) -> np.ndarray:
    """Return the frames of a file as they are on the disk, uint8 [n,H,W,C]; none is read yet.

    Raises:
        DataError: it holds no such array, or none of its frames.

    """
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array: {first_line(error)}") from error
    if found.ndim == 3:
        found = found[..., None]
    if found.ndim != 4 or found.dtype != np.uint8:
        raise DataError(
            f"{path} must be an array [frames, height, width, channels] of uint8, from 0 to 255; "
            f"it is {list(found.shape)} of {found.dtype}"
        )
    if 0 in found.shape:
        raise DataError(f"{path} holds no frames: its shape is {list(found.shape)}")
    return found


def read_array(path: Path, numbers: Sequence[int], short_side: int | None) -> np.ndarray:
    """Return some frames of a file, uint8 [n,H,W,C], scaled as a video's are.

    Raises:
        DataError: it holds no array of frames, or fewer than asked for.

    """
    frames = open_array(path)
    if numbers[-1] >= len(frames):
        raise DataError(f"{path} has {len(frames)} frames; frame {numbers[-1]} was asked for")
    chosen: np.ndarray = frames[list(numbers)]
    height, width = chosen.shape[1:3]
    if short_side is None or short_side == min(height, width):
        return chosen
    factor = short_side / min(height, width)
    size = max(round(height * factor), 1), max(round(width * factor), 1)
    planes = torch.from_numpy(chosen).permute(0, 3, 1, 2).float()
    scaled = F.interpolate(planes, size, mode="area").round().byte()
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).numpy())
