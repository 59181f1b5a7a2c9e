"""From the fixed group `tracking` to a tracker."""

from __future__ import annotations

from pathlib import Path

from expt.protocols import Tracker
from expt.schema import TrackingConfig


def open_tracker(
    config: TrackingConfig, directory: Path, parent_directory: Path | None = None
) -> Tracker:
    """Return the tracker of the run in `directory`, nested under the run of its parent's."""
    if config.uri is None:
        from expt.tracking.null import NullTracker

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
