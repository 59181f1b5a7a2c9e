"""A multirun is one parent run with a child per job, comparable in the MLflow UI.

A Hydra callback (``hydra.callbacks.grid``). The parent is opened when the first job starts, so
that a refused command line leaves none; every child finds it by the sweep's directory, also when
jobs run on other machines. At the end the parent gets the table that is printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from expt.config.compose import key
from expt.config.schema import TrackingConfig
from expt.errors import first_line
from expt.files import make_private, remove_empty_date, write_text
from expt.result import FILE_NAME, PLAN_NAME, RunResult, load_launch, load_result
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
        self._lines: dict[str, list[str]] = {}
        self._refused: dict[str, RunResult] = {}

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
        make_private(directory / HYDRA_FILE)
        typed = OmegaConf.to_container(self._config.hydra.overrides.task, resolve=False)
        self._tracker = open_tracker(tracking, directory)
        self._tracker.start(
            f"grid-{directory.name}",
            {"overrides": " ".join(shown_lines(cast("list[str]", typed)))},
            {"kind": "grid", "run_dir": str(directory)},
        )

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a job's settings, and one that raised or was refused; it may leave no result."""
        if self._config is None:
            return
        name = str(OmegaConf.select(config, "hydra.job.num"))
        self._lines[name] = list(job_return.overrides or ())
        if job_return.status is not JobStatus.COMPLETED:
            self._whole = False
            error: Any = job_return._return_value
        elif job_return.return_value.exit_code:
            self._whole = False
            error = getattr(job_return.return_value, "error", None)
        else:
            return
        if isinstance(error, BaseException):
            self._refused[name] = RunResult("failed", first_line(error))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and record the comparison; the parent fails if a child did."""
        from expt.run.summary import comparison_markdown, comparison_notes, comparison_table
        from expt.tables import print_table

        if self._config is None:
            return
        directory = _sweep_dir(config)
        if self._is_new and (self._tracker is None or not self._whole):
            _remove_traces(directory)
        children = child_results(directory) if directory.is_dir() else {}
        if children:
            children = _in_order({**self._refused, **children})
            settings = self._varied(directory, children)
            print_table(comparison_table(children, settings))
            for note in comparison_notes(children):
                print(note)
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
            write_text(directory / TABLE_NAME, comparison_markdown(children, settings))
            self._tracker.artifact(directory / TABLE_NAME)
        ids = {name: result.tracking["run_id"] or "" for name, result in children.items()}
        self._tracker.tags({f"child.{name}": run_id for name, run_id in ids.items()})
        statuses = {result.status for result in children.values()}
        if "stopped" in statuses:
            self._tracker.finish("KILLED")
        else:
            whole = self._whole and statuses == {"completed"}
            self._tracker.finish("FINISHED" if whole else "FAILED")

    def _varied(self, directory: Path, jobs: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the settings in which the jobs differ, by job; of preset there is a column."""
        given = {}
        for job in jobs:
            launch = load_launch(directory / job)
            lines = self._lines.get(job) if launch is None else launch["overrides"]
            given[job] = {key(line): line.partition("=")[2] for line in lines or ()}
        names = dict.fromkeys(name for own in given.values() for name in own)
        differing = [
            name
            for name in names
            if name != "memory" and len({own.get(name) for own in given.values()}) > 1
        ]
        return {
            job: {name: own[name] for name in differing if name in own}
            for job, own in given.items()
        }


def _in_order(results: Mapping[str, RunResult]) -> dict[str, RunResult]:
    return dict(sorted(results.items(), key=lambda item: (len(item[0]), item[0])))


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
    return _in_order(found)


def child_plans(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the plans under a sweep's directory by job, in job order."""
    paths = directory.glob(f"*/{PLAN_NAME}")
    found = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _sweep_dir(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir).absolute()
