"""The tracker of a run that is not tracked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


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
