"""What ``meta`` of a LeRobot folder says: `Info`, the sentences, and the episodes (`Listed`).

Every field is checked where it is read (`entry`), so that what is wrong is named with its file and
its line, or its row, counted from 0. The layout is described in `expt.jobs.vla.lerobot`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from expt.errors import DataError, first_line

VERSIONS = ("v2.0", "v2.1", "v3.0")
PATHS = {
    "data_path": {
        2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    },
    "video_path": {
        2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
"""Where files lie if info.json does not say, by the first number of the version."""


@dataclass(frozen=True)
class Kind:
    """What a field must be, in words, and how that is seen."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _are(values: Any, fit: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(fit(value) for value in values)


NUMBER = Kind("a positive number", lambda value: _is_number(value) and value > 0)
TIME = Kind("a number of seconds", lambda value: _is_number(value) and value >= 0)
WHOLE = Kind("a whole number, 0 or more", _is_whole)
COUNT = Kind("a positive whole number", lambda value: _is_whole(value) and value > 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: _are(value, TEXT.fits))
SHAPE = Kind("a list of positive whole numbers", lambda value: _are(value, COUNT.fits))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))


def entry(stored: Any, name: str, kind: Kind, where: str, default: Any = None) -> Any:
    """Return a field of an object, or of a row of a table, checked.

    Args:
        stored: the object.
        name: of the field.
        kind: what it must be.
        where: the object is, for messages.
        default: returned where there is no such field, or a null; None: there must be one.

    Raises:
        DataError: it is no object, or has no such field, or one of another kind.

    """
    if not isinstance(stored, Mapping):
        raise DataError(f"{where} must be an object, not {_shown(stored)}")
    value = stored.get(name)
    if value is None and default is not None:
        return default
    if not kind.fits(value):
        got = _shown(value) if name in stored else "nothing"
        raise DataError(f"{where}: {name} must be {kind.words}; there is {got}")
    return int(cast(Any, value)) if kind in (WHOLE, COUNT) else value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


@dataclass(frozen=True)
class Listed:
    """An episode as ``meta`` lists it."""

    number: int
    length: int
    tasks: Sequence[str]
    where: Mapping[str, Any] = field(default_factory=dict)
    """What the templates of paths need, and where 3.0 has an episode within its files."""
    place: str = ""
    """The file and the line that list it."""


@dataclass(frozen=True)
class Info:
    """``meta/info.json`` of a folder."""

    folder: Path
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    paths: Mapping[str, str]
    """Templates of `PATHS`."""
    chunks_size: int
    """Episodes in a folder of 2.x."""

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version[1])

    def file(self, kind: str, values: Mapping[str, Any]) -> Path:
        """Return the file that a template of paths names."""
        try:
            return self.folder / self.paths[kind].format(**values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.folder}/meta/info.json: {kind}={self.paths[kind]!r} is none of version "
                f"{self.version}: {first_line(error)}"
            ) from error

    def names(self, key: str) -> list[str]:
        """Return the names of a feature's values, numbers where it has none."""
        names = self.features[key].get("names")
        while isinstance(names, Mapping) and names:
            names = next(iter(names.values()))
        size = self.size(key)
        if isinstance(names, list) and len(names) == size:
            return [str(name) for name in names]
        return [str(number) for number in range(size)]

    def size(self, key: str) -> int:
        """Return how many values a feature has."""
        where = f"{self.folder}/meta/info.json: feature {key!r}"
        return math.prod(entry(self.features[key], "shape", SHAPE, where, default=[1]))

    def cameras(self, kind: str) -> list[str]:
        """Return the features that are pictures: ``video`` or ``image``; no maps of depth."""
        return [
            key
            for key, feature in self.features.items()
            if feature.get("dtype") == kind
            and not (feature.get("info") or {}).get("video.is_depth_map")
        ]


def read_info(folder: Path) -> Info:
    """Read ``meta/info.json``."""
    path = folder / "meta/info.json"
    stored = _json(path, folder)
    version = str(stored.get("codebase_version"))
    if version not in VERSIONS:
        raise DataError(
            f"{path}: codebase_version={version}; versions that can be read are "
            f"{', '.join(VERSIONS)}"
        )
    features = entry(stored, "features", OBJECT, str(path))
    for key, feature in features.items():
        # Also for those that are not read: what is no object here is no such file.
        entry(feature, "dtype", TEXT, f"{path}: feature {key!r}", "")
        entry(feature, "info", OBJECT, f"{path}: feature {key!r}", {})
    paths = {
        kind: entry(stored, kind, TEXT, str(path), default[int(version[1])])
        for kind, default in PATHS.items()
    }
    return Info(
        folder,
        version,
        float(entry(stored, "fps", NUMBER, str(path))),
        features,
        paths,
        entry(stored, "chunks_size", COUNT, str(path), 1000),
    )


def read_tasks(info: Info) -> dict[int, str]:
    """Return the sentences by number."""
    if info.major == 2:
        lines = _lines(info.folder / "meta/tasks.jsonl", info)
        text = "task"
    else:
        path = info.folder / "meta/tasks.parquet"
        table = read_table(path, info)
        # A pandas table whose index are the sentences; what the index is called has varied.
        texts = [name for name in table.column_names if name != "task_index"]
        if "task_index" not in table.column_names or not texts:
            raise DataError(f"{path} has no sentences by task_index")
        text = "task" if "task" in texts else texts[0]
        lines = _rows(path, table)
    return {
        entry(line, "task_index", WHOLE, where): entry(line, text, TEXT, where)
        for where, line in lines
    }


def read_episodes(info: Info) -> list[Listed]:
    """Return the episodes in the order of their numbers."""
    if info.major == 2:
        lines = _lines(info.folder / "meta/episodes.jsonl", info)
    else:
        files = sorted((info.folder / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise _missing(info.folder / "meta/episodes/chunk-000/file-000.parquet", info)
        lines = []
        for path in files:
            table = read_table(path, info)
            kept = [name for name in table.column_names if not name.startswith("stats/")]
            lines += _rows(path, table.select(kept))
    found = {}
    for where, line in lines:
        number = entry(line, "episode_index", WHOLE, where)
        length = entry(line, "length", COUNT, where)
        tasks = entry(line, "tasks", TEXTS, where, [])
        if info.major == 2:
            line = {"episode_chunk": number // info.chunks_size, "episode_index": number}
        found[number] = Listed(number, length, tasks, line, where)
    return [found[number] for number in sorted(found)]


def _rows(path: Path, table: Any) -> list[tuple[str, Any]]:
    """Return the rows of a table, and where each is."""
    return [(f"{path}: row {place}", row) for place, row in enumerate(table.to_pylist())]


def _lines(path: Path, info: Info) -> list[tuple[str, Any]]:
    """Return the lines of a file, each a JSON value, and where it is."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _missing(path, info) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    found = []
    # By line feeds alone: texts may have what `splitlines` takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                found.append((where, json.loads(line)))
            except ValueError as error:
                raise DataError(f"{where} is no JSON: {first_line(error)}") from error
    return found


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: {folder} is no LeRobot folder, nor one of "
            "`python -m expt.jobs.vla.demonstrate`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(stored, dict):
        raise DataError(f"{path} must be a JSON object")
    return stored


def read_table(path: Path, info: Info) -> Any:
    """Read a parquet file but for its images."""
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        images = info.cameras("image")
        return parquet.read_table(path, columns=[name for name in names if name not in images])
    except FileNotFoundError as error:
        raise _missing(path, info) from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _missing(path: Path, info: Info) -> DataError:
    return DataError(f"{path} is missing; a LeRobot folder of version {info.version} has it")
