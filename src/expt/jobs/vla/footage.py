"""Pictures of a LeRobot folder: frames of videos, or images inside the parquet files.

Frames of one episode and camera are decoded the first time that one of them is wanted, all
together, scaled, and kept as a memory-mapped array: 3 P² bytes a picture, 12 kB at 64 pixels. So
samples in any order cost one decoding in all, a process that was killed goes on, and processes that
read at the same time share what is there.

Letters: `T` steps of an episode, `P` pixels of a side.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expt.errors import DataError, first_line
from expt.jobs.clips.decode import Probe, read_frames
from expt.jobs.clips.inspect import inspect_files
from expt.jobs.clips.listing import named
from expt.jobs.vla.columns import STEP, in_order
from expt.jobs.vla.episodes import Array, StoredFrames

RATE_TOLERANCE = 0.01
"""By which a video's frames per second may differ from those of the steps."""


@dataclass(frozen=True)
class Source:
    """Where the pictures of one episode and camera are.

    Attributes:
        path: a video, or a parquet file with images.
        first: the number of the episode's first frame in the video.
        length: steps of the episode.
        episode: its number in the parquet file.

    """

    path: Path
    first: int
    length: int
    episode: int


class Footage(StoredFrames):
    """Pictures by episode and camera; see `expt.jobs.vla.episodes.Frames`.

    Args:
        sources: of every episode, by camera.
        videos: the cameras whose pictures are in videos; the others' are in parquet files.
        pixels: of a side; pictures of other sides are squeezed, P.
        cache: folder for what is decoded.
        frames_per_second: that the videos must have.

    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Source]],
        videos: Sequence[str],
        pixels: int,
        cache: Path,
        frames_per_second: float,
    ) -> None:
        super().__init__(list(sources[0]), self._file, self._decoded)
        self._sources, self._videos = list(sources), frozenset(videos)
        self._pixels, self._cache, self._rate = pixels, cache / "frames", frames_per_second
        self._probes: dict[Path, Probe] = {}

    def check(self, episodes: Sequence[int], cameras: Sequence[str]) -> None:
        """Open every file that will be read.

        Raises:
            DataError: one is missing, damaged, too short, or of another frame rate.

        """
        wanted = [
            (self._sources[number][camera], camera) for number in episodes for camera in cameras
        ]
        missing = sorted({str(one.path) for one, _ in wanted if not one.path.is_file()})
        if missing:
            raise DataError(f"{len(missing)} files are missing: {named(missing)}")
        videos = [one for one, camera in wanted if camera in self._videos]
        if not videos:
            return
        found = inspect_files([one.path for one in videos], self._cache.parent)
        bad = [seen.problem for seen in found.values() if seen.problem]
        if bad:
            raise DataError(
                f"{len(bad)} of {len(found)} videos cannot be read: {'; '.join(bad[:5])}"
            )
        for one in videos:
            probe = found[one.path].probe
            assert probe is not None, "files that cannot be read end here"
            if probe.frames < one.first + one.length:
                raise DataError(
                    f"{one.path} has {probe.frames} frames; episode {one.episode} needs "
                    f"{one.first + one.length}: it is cut short, or of other recordings"
                )
            rate = probe.frames_per_second
            if rate is not None and abs(rate / self._rate - 1) > RATE_TOLERANCE:
                raise DataError(
                    f"{one.path} has {rate:g} frames a second, and meta/info.json says "
                    f"fps={self._rate:g}: frames and actions would not belong together"
                )
            self._probes[one.path] = probe

    def missing_bytes(self, episodes: Sequence[int], cameras: Sequence[str]) -> int:
        """Return what is still to be decoded, in bytes."""
        picture = 3 * self._pixels**2
        return sum(
            self._sources[number][camera].length * picture
            for number in episodes
            for camera in cameras
            if not self._file(number, camera).exists()
        )

    def sizes(self, episodes: Sequence[int], cameras: Sequence[str]) -> list[str]:
        """Return the names and bytes of the files that pictures are read from."""
        paths = {self._sources[number][camera].path for number in episodes for camera in cameras}
        return [f"{path.name} {path.stat().st_size}" for path in sorted(paths)]

    @property
    def folder(self) -> Path:
        """Where decoded pictures are."""
        return self._cache

    def _file(self, episode: int, camera: str) -> Path:
        one = self._sources[episode][camera]
        status = one.path.stat() if one.path.exists() else None
        told = [one.path.absolute(), one.first, one.length, one.episode, camera, self._pixels]
        told += [status.st_size, status.st_mtime_ns] if status else []
        told += [] if camera in self._videos else [STEP]  # earlier versions took the file's order
        return self._cache / f"{hashlib.sha256(str(told).encode()).hexdigest()[:24]}.npy"

    def _decoded(self, episode: int, camera: str) -> Array:
        """Return all pictures of an episode, uint8 [T, 3, P, P]."""
        one = self._sources[episode][camera]
        if camera not in self._videos:
            return np.stack([self._image(one, row) for row in _rows(one, camera)])
        probe = self._probes.get(one.path)
        numbers = range(one.first, one.first + one.length)
        small = probe is not None and min(probe.width, probe.height) < self._pixels
        frames = read_frames(one.path, numbers, None if small else self._pixels, probe)
        return squeezed(frames, self._pixels)

    def _image(self, one: Source, row: Mapping[str, object] | None) -> Array:
        """Return an image that parquet holds, or names a file of, as uint8 [3, P, P]."""
        from PIL import Image, UnidentifiedImageError

        content = row.get("bytes") if row else None
        path = row.get("path") if row else None
        try:
            opened = (
                io.BytesIO(content) if isinstance(content, bytes) else one.path.parent / str(path)
            )
            with Image.open(opened) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"{one.path}: an image of episode {one.episode} cannot be read: {first_line(error)}"
            ) from error
        found: Array = squeezed(pixels[None], self._pixels)[0]
        return found


def squeezed(frames: Array, pixels: int) -> Array:
    """Return frames uint8 [T, H, W, 3] as [T, 3, P, P], averaged over areas."""
    from PIL import Image

    side = (pixels, pixels)
    scaled = [
        np.asarray(Image.fromarray(frame).resize(side, Image.Resampling.BOX)) for frame in frames
    ]
    return np.ascontiguousarray(np.stack(scaled).transpose(0, 3, 1, 2))


def _rows(one: Source, camera: str) -> list[Mapping[str, object] | None]:
    """Return the images of an episode as parquet holds them, in the order of its steps."""
    from pyarrow import parquet

    try:
        known = parquet.read_schema(one.path).names
        table = parquet.read_table(
            one.path,
            columns=[camera, STEP] if STEP in known else [camera],
            filters=[("episode_index", "=", one.episode)],
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{one.path}: {camera} cannot be read: {first_line(error)}") from error
    if len(table) != one.length:
        raise DataError(
            f"{one.path} has {len(table)} images of episode {one.episode}, which has {one.length} "
            "steps"
        )
    ordered = in_order(one.path, one.episode, table)
    rows: list[Mapping[str, object] | None] = ordered.column(camera).to_pylist()
    return rows
