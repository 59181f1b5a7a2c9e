"""A tracker for figures that belong to a step: each is recorded once, however often it is made.

A run that goes back to its last checkpoint when memory runs out takes steps again, and makes
their figures again, equal but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from expt.protocols import Tracker


class OncePerStep:
    """The `Tracker` given, without figures of steps that their name was recorded up to already.

    For what is recorded in the order of steps; what another process recorded is the tracker's own
    affair (`expt.tracking.mlflow`).
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._recorded: dict[str, int] = {}

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
        if new:
            self._tracker.metrics(new, step)

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
