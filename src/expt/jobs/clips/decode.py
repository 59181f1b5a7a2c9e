"""Frames of a video file, of a folder with an image per frame, or of an array.

`probe` opens a file and counts, without decoding, what it should hold; `read_frames` decodes some
of its frames. A file can be damaged so that it still decodes, with frames missing; both numbers
are compared, so that such a file is an error that names it.

Letters: `n` frames, `H` x `W` pixels.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expt.errors import DataError, first_line
from expt.jobs.clips.arrays import ARRAY_SUFFIX, open_array, read_array

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = frozenset(
    (
        ".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv",
        ".ts", ".webm", ".wmv",
    )
)  # fmt: skip
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
MICROSECONDS = 1_000_000
"""In a second, which is what a container's duration is in."""
TOLERANCE = 0.9
"""Part of the frames by the container's duration that must be there."""
MISSING = 3
"""Frames that may be missing between others where a file was cut."""
SEEK_FROM = 64
"""Frames before the first wanted one from which on a seek is tried instead of decoding them."""


@dataclass(frozen=True)
class Probe:
    """What a file says it holds; `frames` is counted where the container does not say."""

    frames: int
    width: int
    height: int
    frames_per_second: float | None = None
    first_time: int = 0
    frame_time: int = 0
    """Of evenly spaced frames: the first one's time and the step, in the stream's unit; else 0."""
    channels: int = 3


def is_clip(path: Path) -> bool:
    """Tell whether a path looks like a video file, a folder of frames, or an array.

    An array beside a video of the same name is something about that video.
    """
    if path.is_dir():
        return any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in path.iterdir())
    if not is_array(path):
        return path.suffix.lower() in VIDEO_SUFFIXES
    videos = (path.with_suffix(suffix) for suffix in VIDEO_SUFFIXES)
    return not (path.with_suffix("").is_dir() or any(video.exists() for video in videos))


def is_array(path: Path) -> bool:
    """Tell whether a path is a file with an array, for which nothing needs to be decoded."""
    return path.suffix.lower() == ARRAY_SUFFIX


def probe(path: Path) -> Probe:
    """Return what a file holds, by its container alone.

    Raises:
        DataError: it is no video, has no frames, or fewer than its container says.

    """
    if path.is_dir():
        images = _images(path)
        with _opened(images[0]) as (container, stream):
            return Probe(len(images), stream.codec_context.width, stream.codec_context.height)
    if is_array(path):
        count, height, width, channels = open_array(path).shape
        return Probe(count, width, height, channels=channels)
    with _opened(path) as (container, stream):
        try:
            times = [packet.pts for packet in container.demux(stream) if packet.size > 0]
        except OSError as error:  # av's errors of reading are of this kind
            raise DataError(f"{path} cannot be read: {_said(error)}") from error
        found = len(times)
        if found == 0:
            raise DataError(f"{path} holds no frames")
        first, step = _spacing(times)
        announced = _announced(container, stream, _steady(times))
        if announced > found:
            raise DataError(
                f"{path} is cut short: it should hold {announced} frames, and {found} are there"
            )
        codec = stream.codec_context
        rate = stream.average_rate
        return Probe(found, codec.width, codec.height, float(rate) if rate else None, first, step)


def read_frames(
    path: Path,
    numbers: Sequence[int],
    short_side: int | None = None,
    probed: Probe | None = None,
) -> np.ndarray:
    """Decode the frames with these numbers.

    Args:
        path: a video file, an array, or a folder of images in the order of the numbers in their
            names.
        numbers: from 0, rising; a number may be there twice.
        short_side: pixels of the shorter side that frames are scaled to, by averaging areas; None
            leaves them as they are.
        probed: what `probe` found; of evenly spaced frames those before the first wanted one are
            then passed over where that can be done exactly.

    Returns:
        RGB, uint8 [n, H, W, 3], all of the size of the first; of an array, with its channels.

    Raises:
        DataError: it cannot be decoded, or ends before the last number.

    """
    if path.is_dir():
        images = _images(path)
        if numbers[-1] >= len(images):
            raise DataError(f"{path} has {len(images)} frames; frame {numbers[-1]} was asked for")
        size: tuple[int, int] | None = None
        found = []
        for number in numbers:
            with _opened(images[number]) as (container, stream):
                frame = next(_decoded(container, stream, images[number]))
                size = size or _scaled(frame, short_side)
                found.append(_rgb(frame, size))
        return np.stack(found)
    if is_array(path):
        return read_array(path, numbers, short_side)
    if probed is not None and probed.frame_time and numbers[0] >= SEEK_FROM:
        with _opened(path) as (container, stream):
            found_late = _read_late(container, stream, numbers, short_side, probed)
        if found_late is not None:
            return found_late
    with _opened(path) as (container, stream):
        pixels, seen = _pick(_decoded(container, stream, path), numbers, short_side)
    if len(pixels) < len(numbers):
        raise DataError(
            f"{path}: frame {numbers[len(pixels)]} was to be decoded, and it ends after "
            f"{seen + 1}: it is cut short or damaged"
        )
    return np.stack(pixels)


def _spacing(times: Sequence[int | None]) -> tuple[int, int]:
    """Return the first time and the step of evenly spaced frames; 0 and 0 of others."""
    if len(times) < 2 or any(time is None for time in times):
        return 0, 0
    ordered = sorted(time for time in times if time is not None)
    step = ordered[1] - ordered[0]
    even = all(after - before == step for before, after in itertools.pairwise(ordered))
    return (ordered[0], step) if even and step > 0 else (0, 0)


def _steady(times: Sequence[int | None]) -> bool:
    """Tell whether nearly all frames are as far apart, so that a duration counts frames."""
    ordered = sorted(time for time in times if time is not None)
    steps = [after - before for before, after in itertools.pairwise(ordered)]
    if not steps:
        return False
    middle = statistics.median(steps)
    return sum(not 0.5 * middle <= step <= 1.5 * middle for step in steps) <= MISSING


def _announced(container: Any, stream: Any, steady: bool) -> int:
    """Return how many frames the container says there are, at least; 0 where it does not say."""
    if stream.frames:
        return int(stream.frames)
    alone = len(container.streams) == 1  # else the duration may be that of the sound
    if not (alone and steady and container.duration and stream.average_rate):
        return 0
    return int(TOLERANCE * float(container.duration / MICROSECONDS * stream.average_rate))


def _read_late(
    container: Any,
    stream: Any,
    numbers: Sequence[int],
    short_side: int | None,
    probed: Probe,
) -> np.ndarray | None:
    """Read after a seek, by the frames' times; None where it does not come out exactly."""
    wanted = [number - numbers[0] for number in numbers]
    try:
        container.seek(probed.first_time + numbers[0] * probed.frame_time, stream=stream)
        pixels, _ = _pick(_from(container, stream, numbers[0], probed), wanted, short_side)
    except (OSError, ValueError):
        return None  # what is wrong with it is said by reading from its start
    return np.stack(pixels) if len(pixels) == len(numbers) else None


def _from(container: Any, stream: Any, number: int, probed: Probe) -> Iterator[Any]:
    """Yield the frames from a number on as they are decoded after a seek, so that none is kept.

    Raises:
        ValueError: their times do not say exactly which frames they are.

    """
    before: int | None = None
    for frame in container.decode(stream):
        time = -1 if frame.pts is None else frame.pts - probed.first_time
        place, rest = divmod(time, probed.frame_time)
        late = place > number if before is None else place != before + 1
        if frame.is_corrupt or rest or late:
            raise ValueError(f"the frame with the time {frame.pts} is none that was expected")
        before = place
        if place >= number:
            yield frame


def _pick(
    frames: Iterator[Any], numbers: Sequence[int], short_side: int | None
) -> tuple[list[np.ndarray], int]:
    """Return the frames with these numbers, as far as there are any, and the last one's number."""
    found: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    number = -1
    for number, frame in enumerate(frames):
        if number < numbers[len(found)]:
            continue
        size = size or _scaled(frame, short_side)
        pixels = _rgb(frame, size)
        while len(found) < len(numbers) and numbers[len(found)] == number:
            found.append(pixels)
        if len(found) == len(numbers):
            break
    return found, number


def _decoded(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise DataError(f"{path}: a frame is damaged")
            yield frame
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be decoded: {_said(error)}") from error


def _scaled(frame: av.VideoFrame, short_side: int | None) -> tuple[int, int]:
    """Return the width and height that frames are scaled to."""
    if short_side is None:
        return frame.width, frame.height
    factor = short_side / min(frame.width, frame.height)
    return max(round(frame.width * factor), 1), max(round(frame.height * factor), 1)


def _rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Return a frame as it is meant to be seen: scaled, without alpha, upright."""
    pixels: np.ndarray = frame.to_ndarray(
        format="rgb24", width=size[0], height=size[1], interpolation="AREA"
    )
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def av_package() -> Any:
    """Return the package that decodes.

    Raises:
        DataError: it is not installed.

    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise DataError(
            "video files are read with the package av, which is not installed: "
            "pip install 'expt[video]'"
        ) from error
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file; yield its container and first video stream.

    Raises:
        DataError: it is no video, or av is not installed.

    """
    av = av_package()
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be opened as a video: {_said(error)}") from error
    with container:
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise DataError(
                f"{path} has no video stream, only {kinds}; it may be cut short or empty"
            )
        stream = container.streams.video[0]
        # One thread a worker: the workers are the parallelism, and threads of theirs would fight.
        stream.codec_context.thread_count = 1
        yield container, stream


def _images(folder: Path) -> list[Path]:
    """Return the images of a folder in the order of their numbers."""
    found = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise DataError(f"{folder} holds no images")
    return sorted(found, key=lambda entry: (_numbers(entry.stem), entry.name))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _said(error: BaseException) -> str:
    """Return what av says, without the path that it repeats."""
    return str(getattr(error, "strerror", None) or first_line(error)).partition(":")[0]
