"""Loggers beside MLflow: ``tracking.loggers=[mlflow,csv,tensorboard]``.

``csv/metrics.csv`` and ``tensorboard/`` are in the run's directory. A run that is resumed goes on
in the same files; what it does again is not written twice into the CSV.
"""

from __future__ import annotations

import csv
import errno
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from expt.config.schema import TrackingConfig
from expt.errors import StorageError
from expt.files import replace_atomically
from expt.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

_ASIDE = ".metrics.before*.csv"
"""In the run's directory: earlier versions put the figures of a run that went on aside."""


class CsvTracker(NullTracker):
    """A `Tracker` of figures only: a row per call, a column per name.

    Figures that could not be written, on a full disk, are written with the next; what is in the
    file stays there whatever happens.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._columns, self._failed = path, list[str](), False
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        rows = self._rows()
        self._known = {(name, step) for step, values in rows for name in values}
        if rows:
            self._tried()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures at an optimizer step, those that are not there yet."""
        new = {name: float(values[name]) for name in values if (name, step) not in self._known}
        self._known |= {(name, step) for name in new}
        if new:
            self._waiting.append((step, new))
            self._tried()

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Return whether all is written."""
        if self._waiting:
            self._tried()
        return not self._waiting

    def _tried(self) -> None:
        try:
            names = {"step"}.union(*(values for _, values in self._waiting))
            if self._path.exists() and names <= set(self._columns):
                self._append()
            else:
                self._rewrite()
            self._waiting = []
        except (OSError, StorageError) as error:
            if not self._failed:
                log.warning("figures wait until %s can be written: %s", self._path, error)
            self._failed = True

    def _append(self) -> None:
        text = io.StringIO(newline="")
        _write(text, self._columns, self._waiting)
        data = text.getvalue().encode()
        with self._path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(data) != len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _rewrite(self) -> None:
        rows = [*self._rows(), *self._waiting]
        columns = sorted({"step"}.union(*(values for _, values in rows)))

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(columns)
                _write(file, columns, rows)

        replace_atomically(self._path, write)
        self._columns = columns
        for part in self._parts()[:-1]:
            part.unlink()

    def _rows(self) -> list[tuple[int, dict[str, float]]]:
        """Return what is written, every figure once."""
        rows, known = [], set[tuple[str, int]]()
        for part in self._parts():
            for step, values in _rows(part):
                new = {name: value for name, value in values.items() if (name, step) not in known}
                known |= {(name, step) for name in new}
                if new:
                    rows.append((step, new))
        return sorted(rows, key=lambda row: row[0])

    def _parts(self) -> list[Path]:
        """Return the files that figures may be in, those that are put aside first."""
        return [*sorted(self._path.parent.parent.glob(_ASIDE)), self._path]


def _write(file: Any, columns: list[str], rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
    table = csv.DictWriter(file, columns)
    table.writerows({**values, "step": step} for step, values in rows)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    # A row that a kill cut short may end in a figure without its last digit; a power cut leaves \0.
    whole = (line for line in text.split("\n")[:-1] if "\0" not in line)
    for row in csv.DictReader(whole):
        try:
            step = int(row.pop("step"))
            yield step, {k: float(v) for k, v in row.items() if v}
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # an earlier version's, cut short amid the file


class _Logger(Protocol):
    """What is used of a logger of Lightning Fabric."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


class FabricTracker(NullTracker):
    """A `Tracker` of figures only, around a logger of Fabric; a full disk does not end a run."""

    def __init__(self, logger: _Logger) -> None:
        self._logger, self._failed = logger, False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures at an optimizer step."""
        self._tried(lambda: self._logger.log_metrics(dict(values), step))
        self._tried(self._logger.save)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Close the files."""
        self._tried(lambda: self._logger.finalize(status))
        return not self._failed

    def _tried(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s: %s", type(self._logger).__name__, error)
            self._failed = True


class Several:
    """A `Tracker` that records everything in each of some; the first one's ids are the run's."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    @property
    def uri(self) -> str | None:
        """Where the first records."""
        return self._trackers[0].uri

    @property
    def run_id(self) -> str | None:
        """The first one's id of the run."""
        return self._trackers[0].run_id

    @property
    def experiment_id(self) -> str | None:
        """The first one's id of the experiment, if it has one."""
        return getattr(self._trackers[0], "experiment_id", None)

    @property
    def parent_run_id(self) -> str | None:
        """The first one's id of the parent run."""
        return self._trackers[0].parent_run_id

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the run."""
        for tracker in self._trackers:
            tracker.start(name, parameters, tags)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures."""
        for tracker in self._trackers:
            tracker.metrics(values, step)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        for tracker in self._trackers:
            tracker.tags(values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file."""
        for tracker in self._trackers:
            tracker.artifact(path, folder)

    def flush(self) -> bool:
        """Wait for what was recorded to arrive."""
        arrived = [tracker.flush() for tracker in self._trackers]
        return all(arrived)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Close the run in all of them."""
        arrived = [tracker.finish(status) for tracker in self._trackers]
        return all(arrived)


def beside(first: Tracker, config: TrackingConfig, run_dir: Path) -> Tracker:
    """Return a tracker of a training with the loggers that are asked for beside MLflow."""
    more = [_made(name, run_dir) for name in config.loggers if name != "mlflow"]
    return Several([first, *more])


def _made(name: str, run_dir: Path) -> Tracker:
    if name == "csv":
        return CsvTracker(run_dir / "csv/metrics.csv")
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    parts = len(list((run_dir / "tensorboard").glob("events*")))
    # Named after the second that they are begun in, two parts might be one file.
    return FabricTracker(
        TensorBoardLogger(run_dir, name="tensorboard", version="", filename_suffix=f".{parts}")
    )
