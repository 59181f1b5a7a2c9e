"""Every file of a data set, opened once before training; what was found is kept.

A second start opens only files whose size or time has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expt.errors import DataError, StorageError
from expt.files import write_json
from expt.jobs.clips.augment import sharpness
from expt.jobs.clips.decode import Probe, av_package, is_array, probe, read_frames

FORMAT = 2
"""Of what is kept; another one is made anew."""
AT_ONCE = 64
"""Frames that are decoded at a time to judge their sharpness."""


@dataclass(frozen=True)
class Inspected:
    """What one file was found to hold, or what is wrong with it.

    `sharpness` has a value per frame where it was asked for.
    """

    probe: Probe | None
    problem: str | None = None
    sharpness: tuple[float, ...] = ()


def inspect_files(
    paths: Iterable[Path], cache: Path | None, sharpness_at: int | None = None
) -> dict[Path, Inspected]:
    """Open every file once, several at a time.

    Args:
        paths: videos, arrays, or folders of frames.
        cache: folder to keep the findings in; None keeps none.
        sharpness_at: pixels of the shorter side at which every frame's sharpness is measured,
            for which the whole file is decoded; None does not.

    Raises:
        DataError: what decodes is not installed. What is wrong with a file is in its findings, and
            is not kept: the next start looks again.

    """
    wanted = list(dict.fromkeys(paths))
    if not all(map(is_array, wanted)):
        av_package()
    key = hashlib.sha256("\n".join(map(str, wanted)).encode()).hexdigest()[:16]
    file = None if cache is None else cache / f"clips-{key}.json"
    known = _load(file)
    states = {path: _state(path, sharpness_at) for path in wanted}
    todo = [path for path in wanted if _stale(known.get(str(path)), states[path])]
    anew = set(todo)
    found = {path: _restored(known[str(path)]) for path in wanted if path not in anew}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found |= zip(todo, pool.map(lambda p: _inspect(p, sharpness_at), todo), strict=True)
    if file is not None and todo:
        _save(file, {str(p): [states[p], asdict(found[p])] for p in wanted if not found[p].problem})
    return {path: found[path] for path in wanted}


def _inspect(path: Path, sharpness_at: int | None) -> Inspected:
    try:
        seen = probe(path)
        if sharpness_at is None:
            return Inspected(seen)
        values: list[float] = []
        for first in range(0, seen.frames, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, seen.frames))
            values += sharpness(read_frames(path, numbers, sharpness_at, seen)).tolist()
        return Inspected(seen, sharpness=tuple(round(value, 2) for value in values))
    except DataError as error:
        return Inspected(None, str(error))


def _state(path: Path, sharpness_at: int | None) -> list[int | None]:
    """Return what must be as it was for findings to hold: size, time, and what was asked."""
    try:
        status = path.stat()
    except OSError:
        return [None, None, sharpness_at]
    return [status.st_size, status.st_mtime_ns, sharpness_at]


def _stale(kept: Any, state: list[int | None]) -> bool:
    return not kept or kept[0] != state


def _restored(kept: Any) -> Inspected:
    seen = kept[1]["probe"]
    return Inspected(
        Probe(**seen) if seen else None, kept[1]["problem"], tuple(kept[1]["sharpness"])
    )


def _load(file: Path | None) -> Mapping[str, Any]:
    """Return what was kept; nothing where it is absent, damaged or of another format."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file else {}
        return dict(kept["files"]) if kept.get("format") == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _save(file: Path, files: Mapping[str, Any]) -> None:
    with contextlib.suppress(StorageError):  # a read-only place costs the next start a second look
        write_json(file, {"format": FORMAT, "files": files}, durable=False)
