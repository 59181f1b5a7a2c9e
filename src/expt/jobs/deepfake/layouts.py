"""How FaceForensics++, Celeb-DF and DFDC lie on a disk, and how each is divided into parts.

A genuine video is of the class ``original``, any other ``tampered``. Official parts are kept as
they are. What is divided here is divided so that videos of one person (Celeb-DF), or made from one
original (DFDC), stay together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from expt.errors import DataError
from expt.job import Split
from expt.jobs.clips.data import ClipData
from expt.jobs.clips.decode import is_clip
from expt.jobs.clips.listing import Division, Video, below, named

GENUINE, TAMPERED = "original", "tampered"
SPLIT_FILES: dict[Split, str] = {"train": "train.json", "val": "val.json", "test": "test.json"}
MASKS = "masks"
"""Folder beside the compressions, which holds no videos to be judged."""
CELEB_TEST_LIST = "List_of_testing_videos.txt"


def faceforensics(data: ClipData, path: Path, division: Division) -> list[Video]:
    """Read FaceForensics++ (Rössler et al., ICCV 2019) with its official parts.

    ``original_sequences/youtube/C/videos/071.mp4``,
    ``manipulated_sequences/METHOD/C/videos/071_054.mp4`` and ``splits/{train,val,test}.json``,
    lists of pairs of numbers. Masks are left out; of several compressions C,
    ``data.compression`` chooses.

    Raises:
        DataError: a list is absent, or names videos of which there is none, or there are several
            compressions.

    """
    found: list[Video] = []
    absent: list[str] = []
    chosen = _compression(path, data)
    originals = _by_name(path.glob(f"original_sequences/youtube/{chosen}/videos/*"))
    fakes: dict[str, list[Path]] = {}
    for clip in sorted(path.glob(f"manipulated_sequences/*/{chosen}/videos/*")):
        if is_clip(clip):
            fakes.setdefault(clip.stem, []).append(clip)
    if not originals or not fakes:
        raise DataError(
            f"{path} holds no FaceForensics++: expected original_sequences/youtube/c23/videos/ and "
            "manipulated_sequences/METHOD/c23/videos/ with mp4 files"
        )
    for split, name in SPLIT_FILES.items():
        for first, second in _pairs(path / "splits" / name):
            for number in (first, second):
                if number in originals:
                    clip = originals[number]
                    found.append(Video(clip, GENUINE, f"{first}_{second}", split))
                else:
                    absent.append(f"{number} (splits/{name})")
            for stem in (f"{first}_{second}", f"{second}_{first}"):
                for clip in fakes.get(stem, []):
                    found.append(Video(clip, TAMPERED, f"{first}_{second}", split))
    if absent:
        raise DataError(
            f"{path}: the official parts name {len(absent)} original videos that are not there: "
            f"{named(absent)}; download them, or take them out of the lists in splits/"
        )
    return found


def celeb_df(data: ClipData, path: Path, division: Division) -> list[Video]:
    """Read Celeb-DF v2 (Li et al., CVPR 2020): its official test list, the rest divided by person.

    ``Celeb-real/id0_0000.mp4``, ``Celeb-synthesis/id0_id1_0000.mp4``, ``YouTube-real/00000.mp4``
    and ``List_of_testing_videos.txt``. A tampered video is grouped with the first person in its
    name. People of the official test list are in the rest, too, as that list has it.

    Raises:
        DataError: a folder or the list is absent, or the list names videos that are not there.

    """
    folders = {"Celeb-real": GENUINE, "YouTube-real": GENUINE, "Celeb-synthesis": TAMPERED}
    listed = path / CELEB_TEST_LIST
    if not listed.is_file() or not (path / "Celeb-synthesis").is_dir():
        raise DataError(
            f"{path} holds no Celeb-DF: expected {', '.join(folders)} and {CELEB_TEST_LIST}"
        )
    tests = {line.split()[-1] for line in listed.read_text("utf-8").splitlines() if line.strip()}
    found = []
    for name, label in folders.items():
        for clip in sorted((path / name).glob("*")):
            if not is_clip(clip):
                continue
            key = f"{name}/{clip.name}"
            group = clip.stem.split("_")[0] if name != "YouTube-real" else key
            split: Split | None = "test" if key in tests else None
            tests.discard(key)
            found.append(Video(clip, label, group, split))
    if tests:
        raise DataError(
            f"{path}: {CELEB_TEST_LIST} names {len(tests)} videos that are not there: "
            f"{named(sorted(tests))}"
        )
    return division.parts(found)


def dfdc(data: ClipData, path: Path, division: Division) -> list[Video]:
    """Read parts of the DFDC (Dolhansky et al., 2020): a folder or several with metadata.json.

    Videos made from the same original are in one part. ``"split": "test"`` in the metadata holds.

    Raises:
        DataError: there is no metadata, or it names videos that are not there.

    """
    files = sorted([*path.glob("metadata.json"), *path.glob("*/metadata.json")])
    if not files:
        raise DataError(f"{path} holds no DFDC: expected metadata.json in it or in its folders")
    found: list[Video] = []
    absent: list[str] = []
    for file in files:
        for name, entry in _object(file).items():
            clip = file.parent / name
            if not clip.exists():
                absent.append(f"{name} ({file.relative_to(path)})")
                continue
            label = str(entry.get("label", "")) if isinstance(entry, dict) else ""
            if label not in ("REAL", "FAKE"):
                raise DataError(f"{file}: {name} has the label {label!r}, neither REAL nor FAKE")
            group = f"{below(file.parent, path)}/{entry.get('original') or name}"
            video = Video(clip, GENUINE if label == "REAL" else TAMPERED, group)
            found.append(replace(video, split="test") if entry.get("split") == "test" else video)
    if absent:
        raise DataError(
            f"{path}: metadata.json names {len(absent)} videos that are not there: {named(absent)}"
        )
    return division.parts(found, follow=True)


def _compression(path: Path, data: ClipData) -> str:
    """Return the compression that is there on both sides.

    Raises:
        DataError: there are several, and none is chosen.

    """
    wanted: str | None = getattr(data, "compression", None)
    if wanted is not None:
        return wanted
    sides = ("original_sequences/youtube/*/videos", "manipulated_sequences/*/*/videos")
    found = [{folder.parent.name for folder in path.glob(side)} - {MASKS} for side in sides]
    both = sorted(found[0] & found[1])
    if len(both) > 1:
        raise DataError(
            f"{path} has the compressions {', '.join(both)}; choose one, like "
            f"data.compression={both[0]}"
        )
    return both[0] if both else "*"


def _by_name(clips: Iterator[Path]) -> dict[str, Path]:
    """Return clips by their name without suffix, the first of each."""
    found: dict[str, Path] = {}
    for clip in sorted(clips):
        if is_clip(clip):
            found.setdefault(clip.stem, clip)
    return found


def _pairs(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise DataError(
            f"there is no {file}: the official parts are the files train.json, val.json and "
            "test.json of FaceForensics++, in the folder splits"
        )
    pairs = _json(file)
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise DataError(f'{file} must be a list of pairs like [["071", "054"], …]')
    return [(str(first), str(second)) for first, second in pairs]


def _object(file: Path) -> dict[str, Any]:
    kept = _json(file)
    if not isinstance(kept, dict):
        raise DataError(f"{file} must be an object with an entry for each video")
    return kept


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from error
