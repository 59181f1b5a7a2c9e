"""The files of one tracked run: what was recorded, and how much of it has arrived.

``tracking.jsonl``  one JSON object per line, appended by the training thread, never rewritten
``tracking.json``   the run's id, and how many journal lines the store acknowledged
``tracking.lock``   held (flock) while somebody is sending this journal

A process may be killed at any time. A line torn by that is ended by the next one to append, and
then counts as a line that says nothing. A folder may be copied or moved: the journal says which
run it is of, and where it is, in its first line and in one of the kind ``place`` thereafter.
"""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from expt.files import write_json
from expt.locks import Lock as Lock

JOURNAL = "tracking.jsonl"
STATE = "tracking.json"
LOCK = "tracking.lock"

Record = dict[str, Any]


def now_milliseconds() -> int:
    """Return the time since the epoch in MLflow's unit."""
    return time.time_ns() // 1_000_000


_LATER = ("experiment_id", "digest", "nearby", "folder")
"""Fields of `State` that earlier versions did not write."""


@dataclass
class State:
    """What the sender knows.

    `applied` counts the journal lines acknowledged, header included, and `digest` is the last
    one's. `nearby` is as in `Target`; `folder` was written by earlier versions, whose journals do
    not say where they are.
    """

    uri: str
    experiment: str
    artifact_root: str | None
    key: str
    run_id: str | None = None
    parent_run_id: str | None = None
    applied: int = 1
    experiment_id: str | None = None
    digest: str | None = None
    nearby: dict[str, str] | None = None
    folder: str | None = None

    @classmethod
    def load(cls, directory: Path) -> State | None:
        """Read ``tracking.json``; None while there is none, or none that can be read."""
        try:
            values = json.loads((directory / STATE).read_bytes())
            given = {name: values[name] for name in cls.__dataclass_fields__ if name not in _LATER}
            return cls(**given, **{name: values.get(name) for name in _LATER})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, directory: Path) -> None:
        """Replace ``tracking.json`` in one step; raise StorageError if the disk refuses it."""
        write_json(directory / STATE, asdict(self), durable=False, private=True)


def read_header(directory: Path) -> Record | None:
    """Return the journal's first line (key, uri, parent, and so on), if whole."""
    try:
        with (directory / JOURNAL).open("rb") as file:
            line = file.readline()
    except OSError:
        return None
    record = _parse(line) if line.endswith(b"\n") else None
    return record if record and record.get("kind") == "journal" and "key" in record else None


def read_records(
    directory: Path, *kinds: str, names: Iterable[str] | None = None
) -> Iterator[Record]:
    """Read the records of some kinds, or those of them that mention one of some names.

    The other lines are not parsed: a long run has a million of them.
    """
    beginnings = tuple(f'{{"kind":"{kind}",'.encode() for kind in kinds)
    words = None if names is None else [json.dumps(name).encode() for name in names]
    with (directory / JOURNAL).open("rb") as file:
        for line in file:
            if not line.startswith(beginnings) or not line.endswith(b"\n"):
                continue
            if words is None or any(word in line for word in words):
                record = _parse(line)
                if record is not None:
                    yield record


def key_of(directory: Path) -> str | None:
    """Return the key of the run that a folder's journal is of; None if there is no journal."""
    place = _place(directory)
    return None if place is None else _key(directory, place)


def settle(directory: Path) -> str:
    """Return the key of the run that goes on in a folder, and have the journal say that it is here.

    The copy of a folder has a key of its own from now on, as long as the run that it is a copy of
    is where it was: two would be one.
    """
    place = _place(directory)
    assert place is not None
    key = _key(directory, place)
    here = str(directory.resolve())
    if place.get("folder") == here:
        return key
    before = place.get("folder") or _folder_before(directory, here)
    if before is not None and key_of(Path(before)) == key and not directory.samefile(before):
        key = uuid.uuid4().hex
    journal = Journal(directory, {})
    try:
        journal.append("place", {"key": key, "folder": here})
        journal.sync()
    finally:
        journal.close()
    return key


def _key(directory: Path, place: Record) -> str:
    # Earlier versions noted the key of a copy in the state alone.
    state = State.load(directory) if place["kind"] == "journal" else None
    return state.key if state else str(place["key"])


def _place(directory: Path) -> Record | None:
    """Return the last line that says which run this is and, but for earlier versions', where."""
    place = read_header(directory)
    return place and [place, *read_records(directory, "place")][-1]


def _folder_before(directory: Path, here: str) -> str | None:
    """Return where a run of an earlier version was recorded before, if that is known."""
    state = State.load(directory)
    if state is not None and state.folder is not None:
        return state.folder
    told = [(start.get("tags") or {}).get("run_dir") for start in read_records(directory, "start")]
    elsewhere = [folder for folder in told if folder and str(Path(folder).resolve()) != here]
    return elsewhere[-1] if elsewhere else None


class Journal:
    """The appending side. `header` describes the run; an older journal's own header stays."""

    def __init__(self, directory: Path, header: Mapping[str, Any]) -> None:
        self.path = directory / JOURNAL
        self.resumed = False
        self.end = 0
        """Bytes up to the end of the last whole line appended here."""
        self._header = header
        self._descriptor: int | None = None
        self._torn = False

    def open(self) -> None:
        """Go on with the journal that is there, or begin one; raise OSError if neither works."""
        if self._descriptor is not None:
            return
        directory = self.path.parent
        directory.mkdir(parents=True, exist_ok=True)
        self.resumed = read_header(directory) is not None
        if not self.resumed and self.path.exists():
            # No sender ever acted on a journal whose first line is not whole.
            os.replace(self.path, self.path.with_name(f"{JOURNAL}.unreadable"))
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if self.resumed:
                size = os.fstat(descriptor).st_size
                self._torn = os.pread(descriptor, 1, size - 1) != b"\n"
                self.end = size
            else:
                self._write(
                    descriptor,
                    {"kind": "journal", "time": now_milliseconds(), "key": uuid.uuid4().hex}
                    | {"folder": str(directory.resolve()), **self._header},
                )
        except OSError:
            if not self.resumed:
                os.ftruncate(descriptor, 0)
                self._torn = False
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append one line, stamped with the time; raise OSError if the disk refuses it."""
        self.open()
        assert self._descriptor is not None
        self._write(self._descriptor, {"kind": kind, "time": now_milliseconds(), **fields})

    def sync(self) -> None:
        """Wait until what was appended is on the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the file; `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, descriptor: int, record: Mapping[str, Any]) -> None:
        # One write to a file opened for appending: whole lines, whoever else appends. The kind is
        # first (`read_records`).
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        data = b"\n" + line if self._torn else line
        written = os.write(descriptor, data)
        if written != len(data):
            self._torn = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._torn = False
        self.end = os.lseek(descriptor, 0, os.SEEK_CUR)


@dataclass(frozen=True)
class Line:
    """One whole line, and the byte it ends at."""

    text: bytes
    end: int

    @cached_property
    def record(self) -> Record | None:
        """What it says; None if it is no record."""
        return _parse(self.text)

    @property
    def digest(self) -> str:
        """A hash of it; every line has its time."""
        return sha256(self.text).hexdigest()[:16]


class Reader:
    """The reading side: whole lines, in order, while others may still append."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL
        self._position = 0
        self.passed = 0
        """Lines up to here."""
        self._last = b""

    @classmethod
    def after(cls, directory: Path, state: State) -> Reader:
        """Return a reader past the lines that were acknowledged, or past the first if they changed.

        A power cut may take the end of a journal and leave the state, which was written later;
        what is sent twice does not matter.
        """
        reader = cls(directory)
        whole = reader.skip(state.applied) == state.applied
        if not whole or (state.digest is not None and reader.last.digest != state.digest):
            reader = cls(directory)
            reader.skip(1)
        return reader

    @property
    def last(self) -> Line:
        """The line passed last."""
        return Line(self._last, self._position)

    def skip(self, lines: int) -> int:
        """Pass over lines; return how many there were, which may be fewer."""
        return sum(1 for _ in self._lines(lines))

    def read(self, lines: int) -> list[Line]:
        """Return the next lines, at most so many; a last line that is not whole is left."""
        return [self.last for _ in self._lines(lines)]

    def _lines(self, lines: int) -> Iterator[None]:
        with self._path.open("rb") as file:
            file.seek(self._position)
            for _ in range(lines):
                text = file.readline()
                if not text.endswith(b"\n"):
                    return
                self._last = text
                self._position += len(text)
                self.passed += 1
                yield


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def is_closed(directory: Path) -> bool:
    """Tell whether a run's end was recorded and acknowledged, or nothing was ever recorded."""
    if read_header(directory) is None:
        return True
    state = State.load(directory)
    if state is None:
        return False
    if Reader.after(directory, state).read(1):
        return False
    return has_ended(directory)


def has_ended(directory: Path) -> bool:
    """Tell whether a run's end was recorded, acknowledged or not."""
    kinds = [record["kind"] for record in read_records(directory, "start", "end")]
    return kinds[-1:] == ["end"]
