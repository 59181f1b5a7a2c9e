"""A multirun is one parent run with a child per job, comparable in the MLflow UI.

A Hydra callback (``hydra.callbacks.grid``). The parent is opened when the first job starts, so
that a refused command line leaves none; every child finds it by the sweep's directory, also when
jobs run on other machines. At the end the parent gets the table that is printed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from expt.config.schema import TrackingConfig
from expt.files import remove_empty_date, write_text
from expt.result import FILE_NAME, PLAN_NAME, RunResult, load_result
from expt.tracking.tracker import NullTracker, Tracker, open_tracker
from expt.uri import shown_lines

TABLE_NAME = "comparison.md"
HYDRA_FILE = "multirun.yaml"
"""What Hydra's sweeper leaves in a multirun's folder before it looks at a job."""


class Grid(Callback):
    """Opens and closes the parent run of a multirun; does nothing for a single run."""

    def __init__(self) -> None:
        self._config: DictConfig | None = None
        self._tracker: Tracker | None = None
        self._whole = True
        self._is_new = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the multirun; its jobs are not known to be valid yet."""
        if config.search is None:  # else the sweeper keeps the records
            self._config = config
            self._is_new = not _sweep_dir(config).exists()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run with the first job."""
        if self._config is None or self._tracker is not None:
            return
        tracking = cast(TrackingConfig, OmegaConf.to_object(self._config.tracking))
        if tracking.problems():
            self._tracker = NullTracker()  # every job refuses it, and says why
            return
        directory = _sweep_dir(self._config)
        self._tracker = open_tracker(tracking, directory)
        self._tracker.start(
            f"grid-{directory.name}",
            {"overrides": " ".join(shown_lines(self._config.hydra.overrides.task))},
            {"kind": "grid", "run_dir": str(directory)},
        )

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a job that raised or was refused; the latter leaves no result."""
        if job_return.status is not JobStatus.COMPLETED or job_return.return_value.exit_code:
            self._whole = False

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and record the comparison; the parent fails if a child did."""
        from expt.run.summary import comparison_markdown, comparison_table
        from expt.tables import print_table

        if self._config is None:
            return
        directory = _sweep_dir(config)
        if self._is_new and (self._tracker is None or not self._whole):
            _remove_traces(directory)
        children = child_results(directory) if directory.is_dir() else {}
        if children:
            print_table(comparison_table(children))
            print(f"files: {directory}")
        plans = child_plans(directory) if directory.is_dir() and not children else {}
        if plans:
            from expt.commands import plan

            print_table(plan.comparison_table(plans))
            write_text(directory / TABLE_NAME, plan.comparison_markdown(plans))
        if self._tracker is None:
            return
        if plans:
            self._tracker.artifact(directory / TABLE_NAME)
            self._tracker.finish("FINISHED" if self._whole else "FAILED")
            return
        if children:
            write_text(directory / TABLE_NAME, comparison_markdown(children))
            self._tracker.artifact(directory / TABLE_NAME)
        ids = {name: result.tracking["run_id"] or "" for name, result in children.items()}
        self._tracker.tags({f"child.{name}": run_id for name, run_id in ids.items()})
        statuses = {result.status for result in children.values()}
        if "stopped" in statuses:
            self._tracker.finish("KILLED")
        else:
            whole = self._whole and statuses == {"completed"}
            self._tracker.finish("FINISHED" if whole else "FAILED")


def _remove_traces(directory: Path) -> None:
    """Remove the folder that was made for a multirun of which no job was started."""
    with suppress(OSError):
        if [entry.name for entry in directory.iterdir()] == [HYDRA_FILE]:
            (directory / HYDRA_FILE).unlink()
            directory.rmdir()
            remove_empty_date(directory.parent)


def child_results(directory: Path) -> dict[str, RunResult]:
    """Return the results under a sweep's directory by job, in job order."""
    found = {}
    for path in directory.glob(f"*/{FILE_NAME}"):
        result = load_result(path.parent)
        if result is not None:
            found[path.parent.name] = result
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def child_plans(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the plans under a sweep's directory by job, in job order."""
    paths = directory.glob(f"*/{PLAN_NAME}")
    found = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _sweep_dir(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir).absolute()
