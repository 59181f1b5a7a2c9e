"""Where a run is recorded: the `Tracker` protocol, and the trackers that need no server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from expt.config.schema import TrackingConfig
from expt.result import TrackerStatus
from expt.tracking.journal import is_closed


class Tracker(Protocol):
    """Where a run is recorded. No method waits for a server, and none raises because of one."""

    @property
    def uri(self) -> str | None:
        """Where the records go."""

    @property
    def run_id(self) -> str | None:
        """The tracking server's id of this run, once it is known."""

    @property
    def parent_run_id(self) -> str | None:
        """The id of the run this one is nested under, once it is known."""

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the run, or go on with the one this directory already belongs to."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures at an optimizer step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file."""

    def flush(self) -> bool:
        """Wait a bounded time for what was recorded to arrive; return whether all of it did."""

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Close the run and flush."""


class OncePerStep:
    """The `Tracker` given, without figures of steps that their name was recorded up to already.

    For what is recorded in the order of steps; what another process recorded is the tracker's own
    affair (`expt.tracking.mlflow`).
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._recorded: dict[str, int] = {}
        self._last: dict[str, float] = {}

    @property
    def uri(self) -> str | None:
        """Where the records go."""
        return self._tracker.uri

    @property
    def run_id(self) -> str | None:
        """The run's id, once it is known."""
        return self._tracker.run_id

    @property
    def parent_run_id(self) -> str | None:
        """The parent run's id, once it is known."""
        return self._tracker.parent_run_id

    def start(self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the run."""
        self._tracker.start(name, parameters, tags)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures that are new at this step."""
        new = {name: value for name, value in values.items() if self._recorded.get(name, -1) < step}
        self._recorded |= dict.fromkeys(new, step)
        self._last |= new
        if new:
            self._tracker.metrics(new, step)

    def changed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the figures whose last point has another value, or that have none."""
        return {name: value for name, value in values.items() if self._last.get(name) != value}

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._tracker.tags(values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file."""
        self._tracker.artifact(path, folder)

    def flush(self) -> bool:
        """Wait for what was recorded to arrive."""
        return self._tracker.flush()

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Close the run."""
        return self._tracker.finish(status)


def open_tracker(
    config: TrackingConfig, directory: Path, parent_directory: Path | None = None
) -> Tracker:
    """Return the tracker of the run in `directory`, nested under the run of its parent's."""
    if config.uri is None:
        return NullTracker()
    from expt.tracking.mlflow import MlflowTracker

    return MlflowTracker(
        uri=config.uri,
        experiment=config.experiment,
        directory=directory,
        artifact_root=Path(config.artifacts) if config.artifacts else None,
        parent_directory=parent_directory,
        flush_seconds=config.flush_seconds,
    )


def close_left_open(
    config: TrackingConfig,
    directory: Path,
    parent_directory: Path | None,
    status: TrackerStatus,
) -> None:
    """End the run in `directory`, whose process ended before it could do so itself."""
    if not is_closed(directory):
        tracker = open_tracker(config, directory, parent_directory)
        tracker.start(directory.name, {}, {})
        tracker.finish(status)


class NullTracker:
    """A `Tracker` that records nothing, so that nobody asks whether tracking is on."""

    uri: str | None = None
    run_id: str | None = None
    parent_run_id: str | None = None

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def flush(self) -> bool:
        """Return True: nothing is outstanding."""
        return True

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Return True: nothing is outstanding."""
        return True
