"""Sends the journal of one run to a store: in order, at least once, from where it stopped.

Metrics arrive once all the same, because a store knows a point by its name, step, time and value.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from expt.errors import StorageError
from expt.locks import Lock
from expt.tracking.journal import (
    JOURNAL,
    LOCK,
    Line,
    Reader,
    Record,
    State,
    key_of,
    read_header,
    settle,
)
from expt.tracking.store import (
    METRICS_PER_CALL,
    PARENT_TAG,
    MlflowStore,
    Point,
    RefusedError,
    RunMissingError,
    reason,
)
from expt.uri import (
    absolute_uri,
    is_server,
    sqlite_path,
    sqlite_uri,
    with_password,
    without_password,
)

_logger = logging.getLogger(__name__)

PAUSES_SECONDS = (0.5, 2.0, 0.0)
"""The rest after each attempt to store an artifact; as many attempts as there are rests."""


def send_artifact(store: MlflowStore, run_id: str, path: str, folder: str) -> bool:
    """Store a file, or say why it is skipped; return whether it is stored.

    Raises:
        Exception: what the store raised, if it does not answer at all.

    """
    if not os.access(path, os.R_OK):
        _logger.warning("an artifact is skipped: %s is gone or cannot be read", path)
        return False
    why = ""
    for pause in PAUSES_SECONDS:
        try:
            store.artifact(run_id, path, folder)
            return True
        except RunMissingError:
            raise
        except Exception as error:
            # Metrics must not wait for where artifacts live.
            if not store.answers():
                raise
            why = reason(error)
            if isinstance(error, RefusedError):
                break
        time.sleep(pause)
    _logger.warning(
        "the artifact %s cannot be stored (%s), it is skipped; the file stays where it is",
        path,
        why,
    )
    return False


class NotReadyError(Exception):
    """Somebody else must act first: the holder of the lock, or the parent run."""


@dataclass(frozen=True)
class Target:
    """Where a run goes; in what was written down, the password is hidden."""

    uri: str
    experiment: str
    artifact_root: str | None

    @classmethod
    def of(cls, uri: str, experiment: str, artifact_root: Path | None) -> Target:
        """Return where settings say, whatever folder a later process is in."""
        root = None if artifact_root is None or is_server(uri) else artifact_root.absolute()
        return cls(absolute_uri(uri), experiment, root.as_uri() if root else None)

    @classmethod
    def kept(cls, directory: Path, header: Record, saved: State | None) -> Target:
        """Return where the run in a folder was sent to, or is to be, by what was written down."""
        before = header if saved is None else asdict(saved)
        kept = cls(before["uri"], before["experiment"], before["artifact_root"])
        return kept.moved(directory, before.get("nearby"))

    def nearby(self, directory: Path) -> dict[str, str] | None:
        """Return where a database and its artifacts are, as seen from a run's folder."""
        database = sqlite_path(self.uri)
        if database is None:
            return None
        paths = {"database": database.parent.resolve() / database.name}
        if self.artifact_root is not None:
            paths["artifacts"] = Path(unquote(urlsplit(self.artifact_root).path)).resolve()
        run = directory.resolve()
        return {name: os.path.relpath(path, run) for name, path in paths.items()}

    def moved(self, directory: Path, nearby: Mapping[str, str] | None) -> Target:
        """Return the target that was moved together with a run's folder, or this if it is there."""
        database = sqlite_path(self.uri)
        if database is None or database.exists() or not nearby:
            return self
        paths = {n: Path(os.path.normpath(directory.resolve() / p)) for n, p in nearby.items()}
        here = paths["database"]
        if not here.exists() and (database.parent.exists() or not here.parent.exists()):
            return self
        _, mark, query = self.uri.partition("?")
        root = paths["artifacts"].as_uri() if "artifacts" in paths else None
        return replace(self, uri=f"{sqlite_uri(here)}{mark}{query}", artifact_root=root)


class Sender:
    """One journal on its way to one run.

    `send_group` raises `NotReadyError`, or whatever the store raised; call it again later.
    Without a `target` the run goes where ``tracking.json``, or else the journal's first line, says,
    or to the database that was moved with it.
    `store` is an open one of that place, for whoever sends many journals.
    """

    def __init__(
        self,
        directory: Path,
        target: Target | None = None,
        store: MlflowStore | None = None,
    ) -> None:
        self.directory = directory
        self.state = State.load(directory)
        self.position = 0
        """Bytes of the journal that the store has."""
        self.without: dict[str, None] = {}
        """Artifacts that were skipped, as they are gone or where artifacts live is."""
        self._target = target
        self._lock = Lock(directory / LOCK)
        self._reader: Reader | None = None
        self._pending: list[Line] = []
        self._store = store
        self._parent: str | None = None
        self._uri = ""
        self._rewound = False
        self._warned: set[str] = set()

    def open(self) -> None:
        """Take the lock and find the place to go on from; raise NotReadyError if another has it."""
        if self._reader is not None:
            return
        if not self._lock.acquire():
            raise NotReadyError(f"a running process sends {self.directory / JOURNAL}")
        try:
            self._go_on()
        except BaseException:
            self.close()
            raise

    def _go_on(self) -> None:
        header = read_header(self.directory)
        if header is None:
            raise NotReadyError(f"nothing was recorded in {self.directory / JOURNAL}")
        self.state = self._found(header, State.load(self.directory))
        self._parent = header.get("parent")
        self._rewind()
        self._save()

    def _found(self, header: Record, saved: State | None) -> State:
        """Return the state to go on with; it says where to and which run, if that is known."""
        target = self._target or Target.kept(self.directory, header, saved)
        self._uri = target.uri
        shown = without_password(target.uri)
        key = key_of(self.directory) if self._target is None else settle(self.directory)
        assert key is not None
        state = State(shown, target.experiment, target.artifact_root, key)
        if saved is not None and saved.key == key:
            kept = Target.kept(self.directory, header, saved)
            if (without_password(kept.uri), kept.experiment) == (shown, target.experiment):
                state = replace(saved, uri=shown, artifact_root=target.artifact_root)
        state.nearby = target.nearby(self.directory)
        return state

    def close(self) -> None:
        """Give the lock back."""
        self._reader = None
        self._lock.release()

    def outstanding(self) -> int:
        """Return how many lines the store does not have yet."""
        self.open()
        return Reader.after(self.directory, self._opened()).skip(sys.maxsize)

    def send_group(self) -> bool:
        """Send the next record, or the next few metrics records; False when nothing is left."""
        self.open()
        group = self._next_group()
        if not group:
            return False
        if self._store is None:
            self._store = MlflowStore(with_password(self._uri))
        try:
            self._send(self._store, group)
        except RunMissingError as error:
            if self._rewound or self._opened().run_id is None:
                raise
            _logger.warning("%s: the whole run is sent again from %s", error, JOURNAL)
            self._rewound = True
            state = self._opened()
            state.run_id, state.applied, state.digest = None, 1, None
            self._rewind()
            return True
        del self._pending[: len(group)]
        self._acknowledged(self._opened().applied + len(group), group[-1])
        self._save()
        return True

    def answers(self) -> bool:
        """Tell whether the store can be read, whatever became of the last call."""
        return self._store is not None and self._store.answers()

    def _next_group(self) -> list[Line]:
        assert self._reader is not None
        if not self._pending:
            self._pending = self._reader.read(METRICS_PER_CALL)
        group: list[Line] = []
        values = 0
        for line in self._pending:
            record = line.record
            if record is None or record["kind"] != "metrics":
                return group or [line]
            values += len(record["values"])
            if group and values > METRICS_PER_CALL:
                break
            group.append(line)
        return group

    def _send(self, store: MlflowStore, group: list[Line]) -> None:
        records = [line.record for line in group if line.record is not None]
        if not records:
            return
        if records[0]["kind"] == "start" or self._opened().run_id is None:
            self._start(store, records[0])
        self._taken(store, records)

    def _taken(self, store: MlflowStore, records: list[Record]) -> None:
        """Have records stored but for those that are refused, which are found by halves."""
        try:
            self._apply(store, records)
        except RefusedError as error:
            if len(records) == 1:
                self._skipped(records[0]["kind"], str(error))
                return
            half = len(records) // 2
            self._taken(store, records[:half])
            self._taken(store, records[half:])

    def _start(self, store: MlflowStore, record: Record) -> None:
        state = self._opened()
        state.parent_run_id = self._parent_run_id()
        tags = dict(record.get("tags") or {}) if record["kind"] == "start" else {}
        if state.parent_run_id is not None:
            tags[PARENT_TAG] = state.parent_run_id
        if state.run_id is None:
            state.run_id = store.open_run(
                state.experiment,
                state.artifact_root,
                state.key,
                record.get("name") or self.directory.name,
                record["time"],
                tags,
            )
            self._save()
        try:
            self._resume(store, record, tags)
        except RefusedError as error:
            self._skipped("start", str(error))

    def _resume(self, store: MlflowStore, record: Record, tags: dict[str, str]) -> None:
        state = self._opened()
        assert state.run_id is not None
        parameters = record.get("parameters") or {}
        state.experiment_id = store.resume(state.run_id, parameters, tags) or None
        if "data.name" in tags:
            store.dataset(
                state.run_id, tags["data.name"], tags["data.fingerprint"], tags["data.source"]
            )

    def _apply(self, store: MlflowStore, records: list[Record]) -> None:
        run_id = self._opened().run_id
        assert run_id is not None
        record = records[0]
        match record["kind"]:
            case "metrics":
                store.metrics(
                    run_id,
                    [
                        Point(name, float(value), part["step"], part["time"])
                        for part in records
                        for name, value in part["values"].items()
                    ],
                )
            case "tags":
                store.tags(run_id, record["values"])
            case "artifact":
                # What is inside the run's folder moved with it; an absolute path stays as it is.
                path = str(self.directory / record["path"])
                if not send_artifact(store, run_id, path, record["folder"]):
                    self.without[path] = None
            case "end":
                store.end(run_id, record["status"], record["time"])

    def _parent_run_id(self) -> str | None:
        if self._parent is None:
            return None
        directory = self.directory / self._parent
        parent = State.load(directory)
        if parent is None or parent.run_id is None:
            if (directory / JOURNAL).exists():
                raise NotReadyError(f"the parent run in {directory} has no id yet")
            return None
        parent_uri = without_password(absolute_uri(parent.uri))
        same = parent_uri == absolute_uri(self._opened().uri)
        return parent.run_id if same else None

    def _rewind(self) -> None:
        self._reader = Reader.after(self.directory, self._opened())
        self._acknowledged(self._reader.passed, self._reader.last)
        self._pending = []

    def _acknowledged(self, lines: int, last: Line) -> None:
        state = self._opened()
        state.applied, state.digest, self.position = lines, last.digest, last.end

    def _opened(self) -> State:
        assert self.state is not None
        return self.state

    def _save(self) -> None:
        try:
            self._opened().save(self.directory)
        except StorageError as error:
            self._warn_once("state", str(error))

    def _skipped(self, kind: str, why: str) -> None:
        self._warn_once(kind, f"the store refused a record of {kind}, it is skipped: {why}")

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            _logger.warning("%s", message)
