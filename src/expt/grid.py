"""A multirun is one parent run with a child per job, comparable in the MLflow UI.

A Hydra callback (``hydra.callbacks.grid``): the parent is opened before the first job; every
child finds it by the sweep's directory, also when jobs run on other machines. At the end the
parent gets the table that is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from expt.files import write_text
from expt.protocols import Tracker
from expt.results import FILE_NAME, RunResult, load_result


class Grid(Callback):
    """Opens and closes the parent run of a multirun; does nothing for a single run."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run."""
        if config.tracking.uri is None:
            return
        from expt.tracking.mlflow import MlflowTracker

        directory = Path(config.hydra.sweep.dir).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        self._tracker = MlflowTracker(
            uri=config.tracking.uri,
            experiment=config.tracking.experiment,
            directory=directory,
            artifact_root=Path(config.tracking.artifacts) if config.tracking.artifacts else None,
            flush_seconds=config.tracking.flush_seconds,
        )
        overrides = list(config.hydra.overrides.task)
        self._tracker.start(
            f"grid-{directory.name}",
            {"overrides": " ".join(overrides)},
            {"kind": "grid", "run_dir": str(directory)},
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and record the comparison; the parent fails if a child did."""
        from expt.report import comparison_table, print_table

        directory = Path(config.hydra.sweep.dir).absolute()
        children = child_results(directory)
        if children:
            print_table(comparison_table(children))
        if self._tracker is None:
            return
        if children:
            write_text(directory / "comparison.md", _markdown(children))
            self._tracker.artifact(directory / "comparison.md")
        done = {name: result.status for name, result in children.items()}
        jobs = [path for path in directory.iterdir() if path.is_dir() and path.name != ".hydra"]
        whole = bool(done) and len(done) == len(jobs) and set(done.values()) == {"completed"}
        ids = {name: r.tracking["run_id"] or "" for name, r in children.items()}
        self._tracker.tags({f"child.{name}": run_id for name, run_id in ids.items()})
        stopped = "stopped" in done.values()
        self._tracker.finish("FINISHED" if whole else "KILLED" if stopped else "FAILED")


def child_results(directory: Path) -> dict[str, RunResult]:
    """Return the results under a sweep's directory by job, in job order."""
    found = {}
    for path in directory.glob(f"*/{FILE_NAME}"):
        result = load_result(path.parent)
        if result is not None:
            found[path.parent.name] = result
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _markdown(children: dict[str, RunResult]) -> str:
    from expt.report import COLUMNS, row

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(name, result)) + " |" for name, result in children.items()]
    return "\n".join(lines) + "\n"
