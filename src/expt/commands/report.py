"""`task=report`: tables and figures of any set of runs, as one HTML page.

Runs come from folders (`report.runs`: a run's, a multirun's, a search's, or a glob), or from
MLflow (an id of a run in `report.runs`, or `report.experiment` with `report.filter`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from expt.config.command_nodes import ReportConfig
from expt.config.schema import TrackingConfig
from expt.config.settings import RunContext
from expt.errors import ConfigError, nearest
from expt.files import write_json, write_text
from expt.reports.contents import Contents, Wanted, contents
from expt.reports.figures.claims import Claim
from expt.reports.page import render
from expt.reports.records import RunRecord, RunSet, ranked_by
from expt.reports.run_table import as_csv, as_markdown, print_runs
from expt.reports.sources.folders import runs_in_folders
from expt.reports.sources.mlflow import is_run_id, runs_by_filter, runs_by_id
from expt.tracking.tracker import open_tracker
from expt.units import parse_bytes
from expt.uri import shown_lines

PAGE_NAME, TABLE_NAME, CSV_NAME, FILE_NAME = "report.html", "runs.md", "runs.csv", "report.json"
DEFAULT_RUNS = "outputs"


@dataclass(frozen=True)
class ReportResult:
    """What ``report.json`` holds; a report that was made is exit code 0, whatever it says."""

    record: dict[str, Any]
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> ReportResult:
    """Make the report of the configured runs.

    Raises:
        ConfigError: a setting out of range, or runs that are not there.

    """
    report = cast(ReportConfig, OmegaConf.to_object(cfg.report))
    tracking = cast(TrackingConfig, OmegaConf.to_object(cfg.tracking))
    if problems := report.problems() + tracking.problems():
        raise ConfigError(problems)
    runs = ranked_by(find_runs(report, tracking), report.metric)
    check_metric(runs)
    budget = runs.budget_bytes if report.budget is None else parse_bytes(report.budget)
    claims = [
        Claim(preset, claim.peak, claim.error, claim.settings)
        for preset, claim in report.claims.items()
    ]
    own = context.launch.get("config_dir")
    folder = [f"--config-dir={own}"] if own else []
    lines = [*folder, *shown_lines(context.launch.get("overrides", ()))]
    wanted = Wanted(
        budget, claims, report.title, report.rows,
        command=shlex.join(["python", "-m", "expt", *lines]),
    )  # fmt: skip
    found = contents(runs, wanted, context.run_dir / "plots")
    record = as_record(runs, wanted, found)
    files = _write(context.run_dir, runs, wanted, found, record)
    print_runs(found.table)
    print(found.page.lead)
    for line in found.page.by_data:
        print(f"  {line}")
    for line in found.page.missing:
        print(f"not shown: {line}")
    print(f"report: {context.run_dir / PAGE_NAME}")
    _track(tracking, context, record, files)
    return ReportResult(record)


def write_page(runs: RunSet, folder: Path, command: str) -> Path:
    """Write the page of a search into its folder, as this task would; return it.

    Args:
        runs: of the search.
        folder: of the search.
        command: that makes the page again.

    """
    runs = ranked_by(runs, None)
    wanted = Wanted(runs.budget_bytes, (), None, ReportConfig.rows, command)
    found = contents(runs, wanted, folder / "plots")
    _write(folder, runs, wanted, found, as_record(runs, wanted, found))
    return folder / PAGE_NAME


def find_runs(report: ReportConfig, tracking: TrackingConfig) -> RunSet:
    """Return the runs that are asked for.

    Raises:
        ConfigError: they are not there, or are of two kinds of source.

    """
    if report.experiment is not None:
        return runs_by_filter(tracking.uri, report.experiment, report.filter)
    given = DEFAULT_RUNS if report.runs is None else report.runs
    names = [str(one) for one in (given if isinstance(given, list) else [given])]
    if not names:
        raise ConfigError("report.runs is empty; give folders, globs, or MLflow run ids")
    ids = [name for name in names if is_run_id(name) and not Path(name).exists()]
    if ids and len(ids) < len(names):
        raise ConfigError(
            f"report.runs names MLflow runs ({', '.join(ids)}) and folders; give one kind"
        )
    if ids:
        return runs_by_id(tracking.uri, ids)
    return runs_in_folders(names)


def check_metric(runs: RunSet) -> None:
    """Refuse a metric that no run has though some have others.

    Raises:
        ConfigError: with the names that there are.

    """
    known = {name for record in runs.records for name in record.metrics if "/" in name}
    own = {name for name in known if not name.startswith("memory/")}
    metric = runs.metric.name
    if own and all(record.value is None for record in runs.records) and metric not in own:
        raise ConfigError(f"report.metric={metric}: no run has it; {nearest(metric, own)}")


def as_record(runs: RunSet, wanted: Wanted, found: Contents) -> dict[str, Any]:
    """Return the content of ``report.json``."""
    return {
        "source": runs.source,
        "study": runs.study,
        "runs": len(runs.records),
        "metric": runs.metric.name,
        "goal": runs.metric.goal,
        "budget_bytes": wanted.budget_bytes,
        "best": _described(found.best),
        "pareto": [
            {"name": one.name, "value": one.value, "demand_bytes": one.demand_bytes}
            for one in found.pareto
        ],
        "importance": dict(found.importance.shares),
        "data": [
            {
                "name": group.name,
                "runs": len(group.records),
                "best": _described(found.best_of[group.name]),
            }
            for group in found.groups
        ],
        "not_shown": list(found.page.missing),
    }


def _described(run: RunRecord | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {
        "name": run.name,
        "value": run.value,
        "demand_bytes": run.demand_bytes,
        "run_dir": run.run_dir,
        "run_id": run.run_id,
    }


def _write(
    run_dir: Path, runs: RunSet, wanted: Wanted, found: Contents, record: dict[str, Any]
) -> list[Path]:
    write_text(run_dir / PAGE_NAME, render(found.page))
    write_text(run_dir / TABLE_NAME, as_markdown(found.table))
    write_text(run_dir / CSV_NAME, as_csv(runs.records, runs.metric))
    write_json(run_dir / FILE_NAME, record)
    own = [run_dir / name for name in (PAGE_NAME, TABLE_NAME, CSV_NAME, FILE_NAME)]
    return [*own, *found.figures]


def _track(
    tracking: TrackingConfig, context: RunContext, record: dict[str, Any], files: Sequence[Path]
) -> None:
    """Record the report and what it is about."""
    tracker = open_tracker(tracking, context.run_dir, context.parent_dir)
    about = {"source": record["source"], "runs": record["runs"], "metric": record["metric"]}
    tracker.start(
        f"report-{context.run_dir.name}", about, {"kind": "report", "run_dir": str(context.run_dir)}
    )
    for path in files:
        tracker.artifact(path, "" if path.parent == context.run_dir else "plots")
    tracker.finish("FINISHED")
