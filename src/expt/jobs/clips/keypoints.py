"""Keypoints beside the frames of a clip: joints of a body, or the state of a simulator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from expt.errors import DataError, first_line
from expt.job import Split
from expt.jobs.clips.listing import Video, key_of, named

if TYPE_CHECKING:
    from numpy.lib.npyio import NpzFile

NAME = "keypoints.npz"
MOVES = 1e-6
"""Standard deviation, relative to the mean's size, from which on a value is one that moves."""
FARTHEST = 10.0
"""Standard deviations that a value is limited to."""


class Located(Protocol):
    """What keypoints need of a data set."""

    root: Path
    videos: list[Video]
    parts: dict[Split, list[Video]]

    def frames_of(self, path: Path) -> int:
        """Return how many frames a video has."""


class Keypoints:
    """Keypoints of every frame of every video, standardised by the training part's values.

    Args:
        data: whose videos they belong to.
        path: npz with an array [frames, J, D] for each video, under its path below the data's
            root without suffix; None: `NAME` there.

    Raises:
        DataError: there is no such file, or a video has none in it.

    """

    def __init__(self, data: Located, path: str | None) -> None:
        file = Path(path).expanduser() if path else data.root / NAME
        if not file.is_file():
            raise DataError(
                f"data.load_kpt=true: there is no {file}; data.keypoints_path names another, "
                "data.load_kpt=false does without"
            )
        try:
            with np.load(file) as arrays:
                self._arrays = _read(arrays, data)
        except (ValueError, OSError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{file} must be an npz file with an array [frames, keypoints, values] for each "
                f"video: {first_line(error)}"
            ) from error
        first = next(iter(self._arrays.values()))
        self.shape: tuple[int, int] = (first.shape[1], first.shape[2])
        training = np.concatenate([self._arrays[v.path] for v in data.parts["train"]])
        training = np.where(np.isfinite(training), training, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a joint that was never seen
            self._mean = np.nan_to_num(np.nanmean(training, axis=0, dtype=np.float64))
            deviation = np.nan_to_num(np.nanstd(training, axis=0, dtype=np.float64))
        moves = deviation > MOVES * np.maximum(np.abs(self._mean), 1.0)
        self._deviation = np.where(moves, deviation, np.inf)

    def of(self, video: Video, numbers: Sequence[int]) -> Tensor:
        """Return the keypoints of some frames [T,J,D], float32, in standard deviations.

        0 for those not seen, and for values that do not move in the training part.
        """
        values = self._arrays[video.path][list(numbers)]
        scaled = (np.where(np.isfinite(values), values, self._mean) - self._mean) / self._deviation
        scaled = np.clip(scaled, -FARTHEST, FARTHEST)
        return torch.from_numpy(scaled.astype(np.float32))


def _read(arrays: NpzFile, data: Located) -> dict[Path, np.ndarray]:
    keys = {v.path: key_of(v.path, data.root) for v in data.videos}
    missing = [key for key in keys.values() if key not in arrays]
    if missing:
        raise DataError(f"data.load_kpt=true: there are no keypoints for {named(missing)}")
    found = {path: np.asarray(arrays[key], dtype=np.float32) for path, key in keys.items()}
    shapes = {values.shape[1:] for values in found.values()}
    if len(shapes) > 1 or any(values.ndim != 3 for values in found.values()):
        raise DataError(
            f"the keypoints of all videos must be [frames, keypoints, values] with the same last "
            f"two; found {sorted(map(str, shapes))}"
        )
    for path, values in found.items():
        if len(values) != data.frames_of(path):
            raise DataError(
                f"data.load_kpt=true: {path} has {data.frames_of(path)} frames, and its keypoints "
                f"are of {len(values)}"
            )
    return found
