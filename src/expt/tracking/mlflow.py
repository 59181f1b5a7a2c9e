"""Records runs in MLflow without ever waiting for it.

Training thread: every call appends one line to ``<directory>/tracking.jsonl`` and returns. A
daemon thread imports mlflow, opens the store, and sends the journal, again and again while the
store does not answer. Killed at any time and started again on the same directory, a tracker goes
on with the same run. What never arrived is sent by ``python -m expt task=replay``.
"""

from __future__ import annotations

import atexit
import getpass
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from expt.tracking.delivery import REPLAY_COMMAND, Writer
from expt.tracking.journal import Journal, read_records
from expt.tracking.sender import NotReadyError, Sender, Target
from expt.uri import without_password

_logger = logging.getLogger(__name__)


class MlflowTracker:
    """A `Tracker` for one run.

    Args:
        uri: a tracking server, or ``sqlite:///path``; a relative path is taken from here.
        experiment: its name; made if the store has none.
        directory: the run's own folder, where its journal lives.
        artifact_root: where a new experiment keeps its artifacts; a server decides for itself.
        parent_directory: the folder of the run this one is nested under.
        flush_seconds: the longest that `flush` and `finish` wait.

    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        directory: Path,
        artifact_root: Path | None,
        parent_directory: Path | None = None,
        flush_seconds: float = 30.0,
    ) -> None:
        directory = directory.absolute()
        self.target = Target.of(uri, experiment, artifact_root)
        # Relative, as `nearby` is: a whole tree of runs can be moved and replayed elsewhere.
        parent = parent_directory and os.path.relpath(
            parent_directory.resolve(), directory.resolve()
        )
        self._journal = Journal(
            directory,
            {
                "uri": without_password(self.target.uri),
                "experiment": experiment,
                "artifact_root": self.target.artifact_root,
                "parent": parent,
                "nearby": self.target.nearby(directory),
            },
        )
        self._flush_seconds = flush_seconds
        self._sender = Sender(directory, self.target)
        self._writer: Writer | None = None
        self._before: _Recorded | None = None
        self._last: dict[str, tuple[int, float]] = {}
        self._lost_records = False
        self._warned_incomplete = False

    @property
    def uri(self) -> str:
        """Where the records go, as it may be shown."""
        return without_password(self.target.uri)

    @property
    def run_id(self) -> str | None:
        """The run's id, once the store gave one, in this process or an earlier one."""
        return self._sender.state.run_id if self._sender.state else None

    @property
    def experiment_id(self) -> str | None:
        """The store's id of the experiment, once it is known."""
        return self._sender.state.experiment_id if self._sender.state else None

    @property
    def parent_run_id(self) -> str | None:
        """The parent run's id, once it is known."""
        return self._sender.state.parent_run_id if self._sender.state else None

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the run, or go on with the one this directory already belongs to."""
        self._before = self._recorded()
        origin = {
            "mlflow.user": _user(),
            "mlflow.source.name": sys.argv[0] if sys.argv and sys.argv[0] else "<console>",
            "mlflow.source.type": "LOCAL",
        }
        self._record(
            "start",
            name=name,
            parameters=_flatten(parameters),
            tags={**origin, **{key: str(value) for key, value in tags.items()}},
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures; what was recorded alike, by an interrupted run too, is left out."""
        before = self._before or self._recorded(values)
        numbers = {
            name: number
            for name, number in ((name, float(value)) for name, value in values.items())
            if self._last.get(name) != (step, number) and not before.has(name, step, number)
        }
        self._last |= {name: (step, number) for name, number in numbers.items()}
        if numbers:
            # JSON has no NaN or infinity; float() reads these words back.
            words = {k: v if math.isfinite(v) else repr(v) for k, v in numbers.items()}
            self._record("metrics", step=int(step), values=words)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._record("tags", values={name: str(value) for name, value in values.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder, which is read when it is sent."""
        path, own = path.absolute(), self._journal.path.parent
        # Relative like the parent, where the run's own folder holds it.
        kept = path.relative_to(own) if path.is_relative_to(own) else path
        self._record("artifact", path=str(kept), folder=folder)

    def flush(self) -> bool:
        """Wait for everything to arrive, but not for a server that has not been answering."""
        arrived = self._writer is None or self._writer.flush(self._journal.end, self._flush_seconds)
        if not arrived and not self._warned_incomplete:
            self._warned_incomplete = True
            _logger.warning(
                "some tracking records have not reached %s; they are kept in %s. When this "
                "process has ended and the store answers: %s",
                self.uri,
                self._journal.path,
                REPLAY_COMMAND,
            )
        return arrived and not self._lost_records

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Close the run and flush."""
        self._record("end", status=status)
        arrived = self.flush()
        self.close()
        return arrived

    def close(self) -> None:
        """Stop sending and leave the rest in the journal; the run stays open."""
        if self._writer is not None:
            atexit.unregister(self.close)
            self._writer.close()
            self._writer = None
        self._journal.close()

    def _recorded(self, names: Iterable[str] | None = None) -> _Recorded:
        """Return the figures that other processes recorded here, or those of some names."""
        with suppress(OSError):  # the append that follows meets the same, and says so
            self._journal.open()
            if self._journal.resumed:
                return _Recorded.read(self._journal.path.parent, names)
        return _Recorded()

    def _record(self, kind: str, **fields: Any) -> None:
        try:
            self._journal.append(kind, fields)
        except OSError as error:
            if not self._lost_records:
                self._lost_records = True
                _logger.warning(
                    "cannot write %s (%s); training goes on, but what cannot be written there "
                    "is not tracked",
                    self._journal.path,
                    error.strerror or error,
                )
            return
        self._deliver()

    def _deliver(self) -> None:
        """Let the thread that sends know that there is more."""
        if self._writer is None:
            # A new sender: an earlier writer may still be inside a long request.
            self._sender = Sender(self._journal.path.parent, self.target)
            self._writer = Writer(self._sender, self._journal.path)
            self._writer.start()
            atexit.register(self.close)
        self._writer.notify(self._journal.end)


class _Recorded:
    """Points that an earlier process recorded, so that redone steps do not show twice."""

    def __init__(self) -> None:
        self.last_step = -1
        self._points: set[int] = set()

    @classmethod
    def read(cls, directory: Path, names: Iterable[str] | None) -> _Recorded:
        """Collect the metrics of a journal, or those of some names."""
        recorded = cls()
        for record in read_records(directory, "metrics", names=names):
            recorded.last_step = max(recorded.last_step, record["step"])
            recorded._points.update(
                hash((name, record["step"], repr(float(value))))
                for name, value in record["values"].items()
            )
        return recorded

    def has(self, name: str, step: int, value: float) -> bool:
        """Tell whether this very point is there."""
        return step <= self.last_step and hash((name, step, repr(value))) in self._points


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container may run as a user without a name
        return "unknown"


class DeferredTracker(MlflowTracker):
    """A `Tracker` whose records stay in the journal until `Deliveries` or a replay sends them."""

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the run, and say where it goes."""
        super().start(name, parameters, tags)
        self.direct()

    def direct(self) -> None:
        """Say in ``tracking.json`` where the run goes: those under it look there."""
        self._sender = Sender(self._journal.path.parent, self.target)
        with suppress(NotReadyError, OSError):  # another sends it, or nothing could be recorded
            self._sender.open()
            self._sender.close()

    def _deliver(self) -> None:
        """Send nothing."""
