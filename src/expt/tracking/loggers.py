"""Loggers beside MLflow: ``tracking.loggers=[mlflow,csv,tensorboard]``, those of Lightning Fabric.

``csv/metrics.csv`` and ``tensorboard/`` are in the run's directory. A run that is resumed goes on
in the same files; what it does again is not written twice into the CSV.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from expt.config.schema import TrackingConfig
from expt.errors import StorageError
from expt.files import replace_atomically
from expt.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

_ASIDE = ".metrics.before"


class _Logger(Protocol):
    """What is used of Fabric's loggers."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


class FabricTracker(NullTracker):
    """A `Tracker` of figures only, around one of Fabric's loggers; a full disk does not end a run.

    Args:
        logger: the logger.
        known: (name, step) of figures that are there already.

    """

    def __init__(self, logger: _Logger, known: set[tuple[str, int]] | None = None) -> None:
        self._logger, self._known, self._failed = logger, known, False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures at an optimizer step."""
        new = dict(values)
        if self._known is not None:
            new = {name: value for name, value in new.items() if (name, step) not in self._known}
            self._known |= {(name, step) for name in new}
        if new:
            self._tried(lambda: self._logger.log_metrics(new, step))
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
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    if name == "tensorboard":
        parts = len(list((run_dir / "tensorboard").glob("events*")))
        # Named after the second that they are begun in, two parts might be one file.
        logger = TensorBoardLogger(
            run_dir, name="tensorboard", version="", filename_suffix=f".{parts}"
        )
        return FabricTracker(logger)
    folder = run_dir / "csv"
    rows = _earlier(folder)
    table = CSVLogger(run_dir, name="csv", version="")
    if rows:
        try:
            _put_together(folder, rows, table.experiment)
        except (OSError, StorageError) as error:
            log.warning("the figures of earlier parts stay in %s: %s", _set_aside(folder)[0], error)
    return FabricTracker(table, {(name, step) for step, values in rows for name in values})


def _earlier(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return what earlier parts of the run wrote, which Fabric's logger would remove: set aside.

    There are several parts where the disk was full when they were to be put together.
    """
    current, parts = folder / "metrics.csv", _set_aside(folder)
    if current.exists():
        parts.append(current.replace(folder.parent / f"{_ASIDE}.{len(parts)}.csv"))
    rows, known = [], set()
    for part in parts:
        with part.open(newline="", encoding="utf-8") as file:
            for step, values in _rows(file):
                new = {name: value for name, value in values.items() if (name, step) not in known}
                known |= {(name, step) for name in new}
                if new:
                    rows.append((step, new))
    return sorted(rows, key=lambda row: row[0])


def _rows(file: Iterable[str]) -> Iterator[tuple[int, dict[str, float]]]:
    for row in csv.DictReader(file):
        try:
            step = int(row.pop("step"))
            yield step, {k: float(v) for k, v in row.items() if v}
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # a line that was cut short


def _put_together(
    folder: Path, rows: Sequence[tuple[int, Mapping[str, float]]], writer: Any
) -> None:
    """Write all rows as the file that Fabric's writer goes on with, then remove the parts."""
    columns = sorted({"step"}.union(*(values for _, values in rows)))

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows({**values, "step": step} for step, values in rows)

    replace_atomically(folder / "metrics.csv", write)
    writer.metrics_keys = columns
    for part in _set_aside(folder):
        part.unlink()


def _set_aside(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob(f"{_ASIDE}*.csv"))
