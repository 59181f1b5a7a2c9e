"""Where demonstrations come from: a packed file, a folder made here, or a LeRobot folder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from expt.errors import DataError
from expt.jobs.vla.demonstrate import SETTINGS, read_folder
from expt.jobs.vla.episodes import Recordings, read_packed
from expt.jobs.vla.lerobot import read_lerobot

SHIPPED = "expt://"
"""Prefix of a path that means a file shipped inside the package."""


def open_recordings(path: str | None, pixels: int, cache: Path, where_to_get: str) -> Recordings:
    """Read whatever a path names.

    Raises:
        DataError: there is nothing, or nothing that can be read.

    """
    if path is None:
        raise DataError(f"data.path is not set. {where_to_get}")
    place = (
        Path(str(files("expt.jobs.vla") / "files" / path.removeprefix(SHIPPED)))
        if path.startswith(SHIPPED)
        else Path(path).expanduser()
    )
    if not place.exists():
        raise DataError(f"data.path={path}: there is no such file or folder. {where_to_get}")
    if place.is_file():
        return read_packed(place)
    if (place / SETTINGS).exists():
        return read_folder(place)
    return read_lerobot(place, pixels, cache)
