"""`ClipData`: labelled videos as clips; what the jobs on video and on deepfakes have in common.

A sample is a function of seed, epoch and index alone, so that the place in an epoch is all that
resuming needs. Every file is opened once at the start, and what cannot be read is named.

Letters: `B` clips, `C` channels, `T` frames, `P` pixels of a side, `J` keypoints of `D` values.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from expt.errors import DataError, nearest
from expt.job import Batch, Metric, Split
from expt.jobs.clips.arrays import digest
from expt.jobs.clips.augment import Crop, normalised
from expt.jobs.clips.decode import Probe, is_array, read_frames
from expt.jobs.clips.frame_cache import FrameCache, Shape, bytes_of, cache_for, has_room
from expt.jobs.clips.inspect import inspect_files
from expt.jobs.clips.keypoints import Keypoints
from expt.jobs.clips.listing import (
    Division,
    Video,
    below,
    classes_of,
    folder,
    interleaved,
    named,
    read_folders,
    read_list,
)
from expt.jobs.clips.sampling import clip_frames, even_start, random_start, span
from expt.units import format_bytes, parse_bytes

SHIPPED = "expt://"
"""Prefix of a path that means videos shipped inside the package."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
MARGIN = 8 / 7
"""Shorter side of a frame over the side of the crop where `resize` is not given (256 over 224)."""

Layout = Callable[["ClipData", Path, Division], list[Video]]


def folders_layout(data: ClipData, path: Path, division: Division) -> list[Video]:
    """Read a folder per class, in a folder per part or not."""
    return read_folders(path, division)


def list_layout(data: ClipData, path: Path, division: Division) -> list[Video]:
    """Read list files."""
    if data.lists["train"] is None:
        raise DataError("data.layout=list needs data.train_list, a file of lines `PATH LABEL`")
    return read_list(path, data.lists, division)


class ClipData:
    """Clips of labelled videos; implements `expt.job.StreamedDataSet` but for what is learned.

    Args:
        path: folder of the videos, which may be arrays too; ``expt://NAME`` is shipped.
        frames: of a clip, T.
        pixels: of a side of a clip, P.
        batch_size: clips per optimizer step.
        eval_batch_size: clips per forward pass in evaluation.
        layout: how the folder is to be read; `layouts` has the names.
        train_list, val_list, test_list: files of lines ``PATH LABEL``, for the layout ``list``.
        val_fraction, test_fraction: of the groups, where the folder has no such part.
        group_pattern: regular expression of what is the same in the names of files that must be
            in one part, in parentheses; None: files are divided one by one.
        where_to_get: said when there is nothing at `path`.
        stride: frames from one of a clip to the next.
        frames_per_second: of a clip, instead of `stride`, for videos of different speed.
        clips_per_video: in evaluation, evenly spread; their scores are averaged.
        resize: pixels of the shorter side that frames are scaled to before they are cropped.
        flip: probability that a training clip is mirrored; 0 where classes have a direction.
        brightness, contrast: how far a training clip's are changed at most.
        augmentation: choose a training clip's frames and its crop by chance; without, they are
            those of evaluation, and the same in every epoch.
        preprocess_on: ``device`` hands the model bytes, which it normalises; ``worker`` hands it
            floating values, four times as many bytes.
        load_kpt: also give the model the keypoints of every frame; they are not mirrored, so that
            `flip` is to be 0.
        keypoints_path: npz with an array [frames, J, D] for each video, under its path without
            suffix; None: ``keypoints.npz`` in `path`.
        min_sharpness: frames whose Laplacian has a lower variance are dropped; None keeps all.
        frame_cache: keep decoded frames in memory up to this amount, like 500MB; None does not.
        index_cache: folder to keep what was found in the files; None opens them at every start.
        on_bad_clip: ``fail`` names files that cannot be read and ends; ``skip`` leaves them out.
        subsets: patterns of names, ``CLASS/FILE``; accuracy over each is reported by its name.
        tune: let the loop change workers, parts of a batch and `preprocess_on` by what it sees.

    Raises:
        DataError: there is nothing to read, one class only, a class without clips, or files that
            cannot be read.

    """

    layouts: ClassVar[Mapping[str, Layout]] = {"folders": folders_layout, "list": list_layout}
    grouped: ClassVar[Collection[str]] = ()
    """Layouts that say themselves which videos belong together, without `group_pattern`."""
    metrics: Sequence[Metric] = ()

    def __init__(
        self,
        path: str | None,
        frames: int,
        pixels: int,
        batch_size: int,
        eval_batch_size: int,
        layout: str = "folders",
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        group_pattern: str | None = None,
        where_to_get: str = "Give the folder of the videos as data.path=FOLDER.",
        stride: int = 1,
        frames_per_second: float | None = None,
        clips_per_video: int = 1,
        resize: int | None = None,
        flip: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        augmentation: bool = True,
        preprocess_on: Literal["device", "worker"] = "device",
        load_kpt: bool = False,
        keypoints_path: str | None = None,
        min_sharpness: float | None = None,
        frame_cache: Any = None,
        index_cache: str | None = None,
        on_bad_clip: str = "fail",
        subsets: Mapping[str, str] | None = None,
        tune: bool = False,
    ) -> None:
        if path is None:
            raise DataError(f"data.path is not set. {where_to_get}")
        self.root, self.shown = _place(path), path
        self.frames, self.pixels, self.stride = frames, pixels, stride
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.clips_per_video, self.frames_per_second = clips_per_video, frames_per_second
        self.preprocess_on, self.tune, self.augments = preprocess_on, tune, augmentation
        self.lists: dict[Split, str | None] = {
            "train": train_list, "val": val_list, "test": test_list,
        }  # fmt: skip
        self.short_side = resize or round(MARGIN * pixels)
        self.crop = Crop(pixels, flip, brightness, contrast)
        self.subsets = dict(subsets or {})
        if not self.root.exists():
            raise DataError(f"data.path={path}: there is no such folder. {where_to_get}")
        division = Division(val_fraction, test_fraction, group_pattern)
        videos = self.layouts[layout](self, folder(self.root), division)
        self._min_sharpness = min_sharpness
        self.found = inspect_files(
            [video.path for video in videos],
            Path(index_cache) if index_cache else None,
            self.short_side if min_sharpness is not None else None,
        )
        self.unreadable = self._judge(on_bad_clip)
        left = [video for video in videos if video.path not in self.unreadable]
        self.classes = classes_of(left, f"data.path={path}")
        self.parts = {s: interleaved(v for v in left if v.split == s) for s in SPLITS}
        self.videos = [video for split in SPLITS for video in self.parts[split]]
        self._first = {"train": 0, "val": len(self.parts["train"])}
        self._first["test"] = self._first["val"] + len(self.parts["val"])
        self.channels = self._channels_of_all()
        self._usable = self._sharp_frames()
        self.keypoints = Keypoints(self, keypoints_path) if load_kpt else None
        self.cache, self._no_cache = self._make_cache(frame_cache)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge the arguments before any file is read; see `expt.job.Checked`."""
        found = [
            f"data.{name} must be at least 1, got {arguments[name]}"
            for name in (
                "frames", "pixels", "batch_size", "eval_batch_size", "stride", "clips_per_video",
            )
            if isinstance(arguments.get(name), int) and arguments[name] < 1
        ]  # fmt: skip
        for name in ("flip", "brightness", "contrast"):
            if not 0 <= arguments.get(name, 0.0) <= 1:
                found.append(f"data.{name} must be from 0 to 1, got {arguments[name]}")
        val, test = arguments.get("val_fraction", 0.15), arguments.get("test_fraction", 0.15)
        if not (val > 0 and test > 0 and val + test < 1):
            found.append(
                "data.val_fraction and data.test_fraction must be positive and leave a part for "
                f"training, got {val} and {test}"
            )
        layout = arguments.get("layout", "folders")
        if layout not in cls.layouts:
            found.append(f"data.layout={layout!r}: {nearest(str(layout), cls.layouts)}")
        if arguments.get("preprocess_on", "device") not in ("device", "worker"):
            found.append(
                f"data.preprocess_on={arguments['preprocess_on']!r} must be device or worker"
            )
        flip, chance = arguments.get("flip", 0.0), arguments.get("augmentation", True)
        if arguments.get("load_kpt", False) and flip and chance:
            found.append(
                f"data.load_kpt=true with data.flip={flip}: keypoints are not mirrored with their "
                "clip; set data.flip=0"
            )
        resize, pixels = arguments.get("resize"), arguments.get("pixels")
        if resize is not None and pixels is not None and resize < pixels:
            found.append(
                f"data.resize={resize} is less than data.pixels={pixels}, which are cut out of it"
            )
        rate = arguments.get("frames_per_second")
        if rate is not None and not rate > 0:
            found.append(f"data.frames_per_second must be positive or null, got {rate}")
        if arguments.get("frame_cache") is not None:
            try:
                parse_bytes(arguments["frame_cache"])
            except ValueError as error:
                found.append(f"data.frame_cache={arguments['frame_cache']} {error}")
        pattern = arguments.get("group_pattern")
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(f"data.group_pattern={pattern!r} is no regular expression: {error}")
            if layout in cls.grouped:
                found.append(
                    f"data.group_pattern={pattern!r}: data.layout={layout} says itself which "
                    "videos belong together; set data.group_pattern=null"
                )
        return found

    def size(self, split: Split) -> int:
        """Return the number of clips: of training one per video, else `clips_per_video`."""
        return len(self.parts[split]) * (1 if split == "train" else self.clips_per_video)

    def item(self, split: Split, index: int, generator: torch.Generator) -> Batch:
        """Read one clip [C,T,P,P]; the target begins with class and number of the video."""
        place, number = divmod(index, 1 if split == "train" else self.clips_per_video)
        video, at = self.parts[split][place], self._first[split] + place
        numbers = self._numbers(split, at, number, generator)
        pixels = self._pixels(at, numbers)
        chance = split == "train" and self.augments
        clip = self.crop.random(pixels, generator) if chance else self.crop.centre(pixels)
        inputs = {"clip": clip if self.preprocess_on == "device" else normalised(clip)}
        if self.keypoints is not None:
            inputs["keypoints"] = self.keypoints.of(video, numbers)
        return Batch(inputs, self.target(video, at, numbers))

    def target(self, video: Video, at: int, numbers: Sequence[int]) -> Tensor:
        """Return what is learned of a clip: class and number of the video, int64."""
        return torch.tensor([self.classes.index(video.label), at])

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of the right shapes; no file is read."""
        kind = torch.uint8 if self.preprocess_on == "device" else torch.float32
        shape = (count, self.channels, self.frames, self.pixels, self.pixels)
        clip = torch.zeros(shape, dtype=kind)
        inputs = {"clip": clip}
        if self.keypoints is not None:
            inputs["keypoints"] = torch.zeros((count, self.frames, *self.keypoints.shape))
        target = self.target(self.videos[0], 0, [0] * self.frames)
        return Batch(inputs, target.expand(count, *target.shape).clone())

    def sample_name(self, split: Split, index: int) -> str:
        """Return the file of a sample."""
        per_video = 1 if split == "train" else self.clips_per_video
        return str(self.parts[split][index // per_video].path)

    def model_arguments(self) -> Mapping[str, Any]:
        """Return what a model may ask for by name."""
        shape = self.keypoints.shape if self.keypoints else (0, 0)
        return {
            "num_classes": len(self.classes),
            "num_channels": self.channels,
            "num_frames": self.frames,
            "num_keypoints": shape[0],
            "keypoint_values": shape[1],
        }

    @property
    def evaluated_clips(self) -> int:
        """The number of clips of the larger of the two parts that are evaluated."""
        return max(self.size("val"), self.size("test"))

    def members(self) -> dict[str, Tensor]:
        """Return which videos [N] each of `subsets` has."""
        return {
            name: torch.tensor([fnmatch.fnmatch(v.name, pattern) for v in self.videos])
            for name, pattern in self.subsets.items()
        }

    def cheaper(self) -> list[str]:
        """Return settings that make a clip cheaper to read; see `expt.job.Advising`."""
        found = []
        if self.preprocess_on == "worker":
            found.append("data.preprocess_on=device")
        if self.cache is None:
            needed = bytes_of(map(self._shape, self.videos))
            if has_room(needed):
                found.append(f"data.frame_cache={-(-needed // 10**6)}MB")
        return [*found, "smaller or shorter files"]

    def clear(self) -> None:
        """Empty the frame cache; see `expt.job.Cached`."""
        if self.cache is not None:
            self.cache.clear()

    def fingerprint(self) -> str:
        """Return a short hash of the files, their classes and parts."""
        told = [
            f"{video.split} {video.label} {below(video.path, self.root)} {_content(video.path)}"
            for video in self.videos
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Return a line of facts, and one per thing that a user should know."""
        sizes = " / ".join(str(len(self.parts[split])) for split in SPLITS)
        lines = [
            f"{Path(self.shown).name}: {len(self.classes)} classes, {sizes} videos to train, "
            f"validate and test; {self.frames} frames of {self.pixels} x {self.pixels} pixels"
        ]
        short = sum(
            self._length(at) < span(self.frames, self._stride(at)) for at in range(len(self.videos))
        )
        if short:
            lines.append(
                f"note: {short} of {len(self.videos)} videos are shorter than a clip and repeat "
                "their last frame; data.stride or data.frames could be less"
            )
        if self.unreadable:
            lines.append(
                f"note: {len(self.unreadable)} videos cannot be read and are left out: "
                f"{named([str(path) for path in self.unreadable])}"
            )
        if self._min_sharpness is not None:
            before = sum(self._probe(video).frames for video in self.videos)
            dropped = before - sum(self._length(at) for at in range(len(self.videos)))
            lines.append(
                f"{dropped} of {before} frames are less sharp than "
                f"data.min_sharpness={self._min_sharpness:g} and dropped"
            )
        if self.cache is not None:
            lines.append(f"the frame cache takes up to {format_bytes(self.cache.bytes)}")
        elif self._no_cache:
            lines.append(f"note: there is no frame cache: it {self._no_cache}")
        return "\n".join(lines)

    def _judge(self, on_bad_clip: str) -> dict[Path, str]:
        """Return the files that cannot be read, and why.

        Raises:
            DataError: there are some, and `on_bad_clip` is ``fail``.

        """
        bad = {path: seen.problem for path, seen in self.found.items() if seen.problem}
        if bad and on_bad_clip != "skip":  # of `expt.config.schema.BadSample`
            raise DataError(
                f"{len(bad)} of {len(self.found)} videos cannot be read: "
                f"{'; '.join(list(bad.values())[:5])}"
                f"{f'; and {len(bad) - 5} more' if len(bad) > 5 else ''}. "
                "loader.on_bad_sample=skip leaves them out"
            )
        return bad

    def _channels_of_all(self) -> int:
        """Return how many channels the videos have.

        Raises:
            DataError: not all have as many.

        """
        first = self.videos[0]
        channels = self._probe(first).channels
        for video in self.videos:
            if self._probe(video).channels != channels:
                one, other = (below(v.path, self.root) for v in (first, video))
                raise DataError(
                    f"data.path={self.shown}: all clips must have the same number of channels; "
                    f"{one} has {channels}, {other} has {self._probe(video).channels}"
                )
        return channels

    def _sharp_frames(self) -> list[list[int] | None]:
        """Return the frames of each video that are sharp enough, None where all are used."""
        if self._min_sharpness is None:
            return [None] * len(self.videos)
        found: list[list[int] | None] = []
        blurred: dict[str, float] = {}
        for video in self.videos:
            values = self.found[video.path].sharpness
            kept = [at for at, value in enumerate(values) if value >= self._min_sharpness]
            if not kept:
                blurred[str(video.path)] = max(values)
            found.append(kept)
        if blurred:
            raise DataError(
                f"{len(blurred)} videos have no frame as sharp as data.min_sharpness="
                f"{self._min_sharpness:g}: {named(list(blurred))}; {min(blurred.values()):g} would "
                "keep one of each"
            )
        return found

    def _make_cache(self, limit: Any) -> tuple[FrameCache | None, str]:
        if limit is None:
            return None, ""
        shapes = [self._shape(video) for video in self.videos]
        made = cache_for(shapes, parse_bytes(limit))
        return (None, made) if isinstance(made, str) else (made, "")

    def _shape(self, video: Video) -> Shape:
        seen = self._probe(video)
        factor = self.short_side / max(min(seen.width, seen.height), 1)
        height, width = (max(round(side * factor), 1) for side in (seen.height, seen.width))
        return seen.frames, height, width, seen.channels

    def _probe(self, video: Video) -> Probe:
        seen = self.found[video.path]
        assert seen.probe is not None, "files that cannot be read are left out"
        return seen.probe

    def _length(self, at: int) -> int:
        usable = self._usable[at]
        return self._probe(self.videos[at]).frames if usable is None else len(usable)

    def _stride(self, at: int) -> int:
        rate = self._probe(self.videos[at]).frames_per_second
        if self.frames_per_second is None or rate is None:
            return self.stride
        return max(round(rate / self.frames_per_second), 1)

    def _numbers(self, split: Split, at: int, number: int, generator: torch.Generator) -> list[int]:
        """Return the numbers of a clip's frames in its file."""
        length, stride = self._length(at), self._stride(at)
        clips = 1 if split == "train" else self.clips_per_video
        start = (
            random_start(length, self.frames, stride, generator)
            if split == "train" and self.augments
            else even_start(length, self.frames, stride, number, clips)
        )
        numbers = clip_frames(length, self.frames, stride, start)
        usable = self._usable[at]
        return numbers if usable is None else [usable[place] for place in numbers]

    def _pixels(self, at: int, numbers: Sequence[int]) -> np.ndarray:
        """Return frames, uint8 [T,H,W,C], from the cache or from the file."""
        path = self.videos[at].path
        if self.cache is None:
            return read_frames(path, numbers, self.short_side, self._probe(self.videos[at]))
        kept = self.cache.get(at, numbers)
        if kept is not None:
            return kept
        whole = read_frames(path, range(self._probe(self.videos[at]).frames), self.short_side)
        self.cache.put(at, whole)
        return whole[list(numbers)]

    def frames_of(self, path: Path) -> int:
        """Return how many frames a video has."""
        seen = self.found[path].probe
        return 0 if seen is None else seen.frames

    @cached_property
    def labels(self) -> Tensor:
        """The class of every video [N], int64."""
        return torch.tensor([self.classes.index(video.label) for video in self.videos])


def _place(path: str) -> Path:
    if path.startswith(SHIPPED):
        return Path(str(files("expt.jobs.video") / "files" / path.removeprefix(SHIPPED)))
    return Path(path).expanduser()


def _content(path: Path) -> str:
    """Return what tells a file from another: its size, and of an array, which says less, frames."""
    return f"{_bytes(path)} {digest(path)}" if is_array(path) else f"{_bytes(path)}"


def _bytes(path: Path) -> int:
    return sum(e.stat().st_size for e in path.iterdir()) if path.is_dir() else path.stat().st_size
