"""Where the videos of a data set are, what class each is of, and which part it belongs to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expt.errors import DataError, nearest
from expt.job import Split
from expt.jobs.clips.decode import is_clip

PARTS: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of folders that are parts."""
NAMED = 5
"""Files that a message names before it counts them."""


@dataclass(frozen=True)
class Video:
    """A clip on disk; `group` is what must not be in two parts, such as a person."""

    path: Path
    label: str
    group: str
    split: Split | None = None

    @property
    def name(self) -> str:
        """Class and file, for patterns and messages."""
        return f"{self.label}/{self.path.name}"


@dataclass(frozen=True)
class Division:
    """How videos that come without parts are divided: by group, in an order of their names.

    Args:
        val_fraction: of the groups.
        test_fraction: of the groups.
        group_pattern: regular expression of a file's name; what its first parentheses find is
            the group. None: every file is its own.

    """

    val_fraction: float = 0.15
    test_fraction: float = 0.15
    group_pattern: str | None = None

    def group(self, path: Path, root: Path) -> str:
        """Return the group of a file; without a pattern its path below `root`.

        Raises:
            DataError: the pattern does not find one.

        """
        if self.group_pattern is None:
            return below(path, root)
        found = re.search(self.group_pattern, path.name)
        if found is None or not found.groups():
            raise DataError(
                f"data.group_pattern={self.group_pattern!r} finds no group in {path.name}; it "
                "must have parentheses around what is the same for videos that belong together"
            )
        return found.group(1)

    def parts(self, videos: Sequence[Video], follow: bool = False) -> list[Video]:
        """Return the videos with their parts; those that have one keep it.

        Where every group is of one class, each class is divided by itself. With `follow`, a video
        whose group has a part already goes there too.
        """
        known = {video.split for video in videos}
        given = {v.group: v.split for v in videos if v.split is not None} if follow else {}
        labels: dict[str, set[str]] = {}
        for video in videos:
            if video.split is None and video.group not in given:
                labels.setdefault(video.group, set()).add(video.label)
        single = all(len(found) == 1 for found in labels.values())
        lanes: dict[str, list[str]] = {}
        for group in sorted(labels, key=_mixed):
            lanes.setdefault(min(labels[group]) if single else "", []).append(group)
        fractions: dict[Split, float] = {"test": self.test_fraction, "val": self.val_fraction}
        chosen: dict[str, Split] = {}
        for lane in lanes.values():
            left = list(lane)
            for split, fraction in fractions.items():
                if split not in known:
                    count = max(round(fraction * len(lane)), 1)
                    chosen |= dict.fromkeys(left[:count], split)
                    left = left[count:]
        return [
            video
            if video.split
            else replace(video, split=given.get(video.group) or chosen.get(video.group, "train"))
            for video in videos
        ]

    def check(self, videos: Sequence[Video]) -> None:
        """Raise DataError if videos that belong together by the pattern are given two parts."""
        if self.group_pattern is None:
            return
        parts: dict[str, set[Split | None]] = {}
        for video in videos:
            parts.setdefault(video.group, set()).add(video.split)
        shared = sorted(group for group, found in parts.items() if len(found) > 1)
        if shared:
            raise DataError(
                f"data.group_pattern={self.group_pattern!r}: {len(shared)} groups are in more than "
                f"one part: {named(shared)}"
            )


def read_folders(path: Path, division: Division) -> list[Video]:
    """Read ``PATH/CLASS/*`` or ``PATH/{train,val,test}/CLASS/*``; without val, some of train is.

    Raises:
        DataError: there is no such folder, or a class without clips.

    """
    folder(path)
    parts = {entry: PARTS[entry.name.lower()] for entry in _folders(path) if _is_part(entry)}
    if not parts:
        return division.parts(list(_classes(path, None, division, path)))
    videos = [
        video for entry, split in parts.items() for video in _classes(entry, split, division, path)
    ]
    division.check(videos)
    if "train" not in parts.values():
        raise DataError(f"{path} has the parts {', '.join(e.name for e in parts)} and no train")
    missing = {"val", "test"} - set(parts.values())
    if missing:
        free = [replace(v, split=None) if v.split == "train" else v for v in videos]
        return division.parts(free)
    return videos


def read_list(root: Path, files: dict[Split, str | None], division: Division) -> list[Video]:
    """Read list files of lines ``PATH LABEL`` or ``PATH,LABEL``; paths are relative to `root`.

    Args:
        root: folder of the videos.
        files: of each part its list; where there is none for val and test, that of train is
            divided.
        division: how.

    Raises:
        DataError: a list is absent, a line has no label, or names a file that is not there.

    """
    folder(root)
    videos: list[Video] = []
    absent: list[str] = []
    seen: dict[Path, str] = {}
    for split, listed in files.items():
        if listed is None:
            continue
        file = _list_file(root, listed)
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, label = _entry(root, line.strip(), f"{file}, line {number}")
            place = root / name
            if not place.exists():
                absent.append(f"{name} (line {number} of {file.name})")
            elif place in seen:
                raise DataError(
                    f"{file}, line {number}: {name} is named twice, also in {seen[place]}; a video "
                    "has one class and is in one part"
                )
            seen[place] = f"line {number} of {file.name}"
            videos.append(Video(place, label, division.group(place, root), split))
    if absent:
        raise DataError(
            f"{root} has no {named(absent)}; paths of a list are relative to data.path, and its "
            "lines are `PATH LABEL` or `PATH,LABEL`"
        )
    division.check(videos)
    if files.get("val") is None or files.get("test") is None:
        videos = [replace(v, split=None) if v.split == "train" else v for v in videos]
    return division.parts(videos)


def classes_of(videos: Sequence[Video], where: str) -> list[str]:
    """Return the names of the classes, those of the training part, numbers in their order.

    Raises:
        DataError: there is one class only, or another part has classes that training has not.

    """
    by_part: dict[Split | None, set[str]] = {"train": set(), "val": set(), "test": set()}
    for video in videos:
        by_part[video.split].add(video.label)
    for split, labels in by_part.items():
        if not labels:
            raise DataError(
                f"{where}: there is no clip for the {split} part; there are {len(videos)} videos, "
                "of which data.val_fraction and data.test_fraction take some"
            )
    classes = by_part["train"]
    if len(classes) < 2:
        raise DataError(
            f"{where}: there is only one class, {min(classes)}, to train on; two are needed"
        )
    for split, labels in by_part.items():
        if labels - classes:
            label = min(labels - classes)
            raise DataError(
                f"{where}: class {label} is in the {split} part and not in the training part; "
                f"{nearest(label, classes)}"
            )
    numeric = all(label.lstrip("-").isdigit() for label in classes)
    return sorted(classes, key=int) if numeric else sorted(classes)


def folder(path: Path) -> Path:
    """Return a folder that there is.

    Raises:
        DataError: there is none, or it is a file.

    """
    if not path.exists():
        raise DataError(f"data.path={path}: there is no such folder")
    if not path.is_dir():
        raise DataError(f"data.path={path} is a file; give the folder that holds the videos")
    return path


def named(names: Sequence[str]) -> str:
    """Return some of many names, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def interleaved(videos: Iterable[Video]) -> list[Video]:
    """Return videos so that their classes take turns; a part of them then has every class."""
    by_label: dict[str, list[Video]] = {}
    for video in sorted(videos, key=lambda v: (v.label, _mixed(str(v.path.name)))):
        by_label.setdefault(video.label, []).append(video)
    lanes = [by_label[label] for label in sorted(by_label)]
    longest = max((len(lane) for lane in lanes), default=0)
    return [lane[place] for place in range(longest) for lane in lanes if place < len(lane)]


def below(path: Path, root: Path) -> str:
    """Return a path below the data's folder, the same wherever that is."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def key_of(path: Path, root: Path) -> str:
    """Return the name under which something is kept for a video: its path without suffix."""
    name = below(path, root)
    return name if path.is_dir() else name.removesuffix(path.suffix)


def _entry(root: Path, line: str, where: str) -> tuple[str, str]:
    """Return path and label of a line of a list, by the separator for which there is a file."""
    forms = [line.rsplit(separator, maxsplit=1) for separator in (",", None)]
    found = [(one[0].strip(), one[1].strip()) for one in forms if len(one) == 2]
    if not found:
        raise DataError(f"{where}: {line!r} has no label after it")
    return next((one for one in found if (root / one[0]).exists()), found[0])


def _classes(path: Path, split: Split | None, division: Division, root: Path) -> Iterator[Video]:
    classes = _folders(path)
    if not classes:
        raise DataError(f"{path} has no folder for a class in it; expected {path.name}/CLASS/FILE")
    for entry in classes:
        clips = sorted(clip for clip in entry.iterdir() if is_clip(clip))
        if not clips:
            raise DataError(f"class {entry.name} has no clips: {entry} holds no video")
        for clip in clips:
            yield Video(clip, entry.name, division.group(clip, root), split)


def _folders(path: Path) -> list[Path]:
    return sorted(e for e in path.iterdir() if e.is_dir() and not e.name.startswith("."))


def _is_part(entry: Path) -> bool:
    inner = [e for e in entry.iterdir() if e.is_dir()]
    return entry.name.lower() in PARTS and bool(inner) and not all(map(is_clip, inner))


def _list_file(root: Path, name: str) -> Path:
    for place in (Path(name).expanduser(), root / name):
        if place.is_file():
            return place
    raise DataError(f"there is no list {name}, neither from here nor in {root}")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is no text in UTF-8; a list has lines like `PATH LABEL`"
        ) from error


def _mixed(name: str) -> str:
    """Return a key that orders names as if at random, the same everywhere."""
    return hashlib.sha256(name.encode()).hexdigest()
