"""Runs from their folders: a run's own, a grid's, a study's, or everything under one."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from expt.errors import ConfigError
from expt.job import Metric
from expt.reports.records import RunRecord, RunSet, flattened
from expt.reports.sources.studies import joined, with_study
from expt.result import (
    FILE_NAME,
    LAUNCH_NAME,
    Outcome,
    RunResult,
    load_launch,
    load_result,
    started_seconds,
)
from expt.search.stored import StudyError
from expt.search.winner import FILE_NAME as SWEEP_NAME

if TYPE_CHECKING:
    from optuna.study import Study

CONFIG_NAME = "config.yaml"
KEY = "report.runs"
SPLITS = ("val/", "test/")


def runs_in_folders(patterns: Sequence[str]) -> RunSet:
    """Return every run in folders that are given by name or as globs.

    Raises:
        ConfigError: a folder is not there, or there is no run in any of them.

    """
    folders = [folder for pattern in patterns for folder in matching(pattern)]
    runs = _plain_runs(folders, ", ".join(patterns))
    if not runs.records:
        raise ConfigError(
            f"{KEY}: there is no run in {', '.join(patterns)}; a run's folder holds {LAUNCH_NAME} "
            f"and {FILE_NAME}. Give a run's, a multirun's or a search's folder"
        )
    summaries = {path for folder in folders for path in folder.rglob(SWEEP_NAME)}
    # The tracker's artifacts hold a copy of a summary, without the trials.
    found = {path.parent for path in summaries if any(path.parent.glob("trial_*"))}
    # In a search's folder is that of its retraining, which has a page of its own.
    studies = {folder for folder in found if not found & set(folder.parents)}
    if len(studies) == 1:
        try:
            return with_study(runs, studies.pop())
        except StudyError as error:
            return replace(runs, notes=(*runs.notes, str(error)))
    if len(studies) > 1:
        note = f"the runs are of {len(studies)} studies, whose trials are not told apart"
        return replace(runs, notes=(*runs.notes, note))
    return runs


def runs_of_search(study: Study, budget_bytes: int | None, folder: Path) -> RunSet:
    """Return the trials of a search whose study is open, with what its folder knows of them.

    Raises:
        StudyError: the study has no trials.

    """
    return joined(_plain_runs([folder], str(folder)), study, budget_bytes, folder)


def _plain_runs(folders: Sequence[Path], source: str) -> RunSet:
    """Return the runs in folders, as far as these know them."""
    found = {path.resolve(): path for folder in folders for path in run_folders(folder)}
    names = _names(list(found))
    records = [read_run(folder, names[folder]) for folder in found]
    return RunSet(tuple(sorted(records, key=lambda one: (one.started, one.name))), source)


def matching(pattern: str) -> list[Path]:
    """Return the folders that a name or a glob stands for.

    Raises:
        ConfigError: there is none.

    """
    expanded = str(Path(pattern).expanduser())
    if Path(expanded).is_dir():
        return [Path(expanded)]
    if Path(expanded).is_file():
        raise ConfigError(f"{KEY}={pattern} is a file; give the folder it is in")
    found = [Path(name) for name in sorted(glob.glob(expanded, recursive=True))]
    folders = [path for path in found if path.is_dir()]
    if not folders:
        kind = "glob matches no folder" if glob.has_magic(expanded) else "folder is not there"
        raise ConfigError(
            f"{KEY}={pattern}: this {kind}; give the folder of a run, a multirun or a search, a "
            "glob like 'outputs/runs/*/*', or an MLflow run id"
        )
    return folders


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs in and under a folder; copies in an artifact store are none."""
    for path in sorted(folder.rglob(LAUNCH_NAME)):
        run = path.parent
        if (run / FILE_NAME).exists() or (run / CONFIG_NAME).exists():
            yield run


def read_run(folder: Path, name: str) -> RunRecord:
    """Return what a run's folder says."""
    settings = _settings(folder)
    launch = load_launch(folder)
    cwd = None if launch is None else str(launch["cwd"])
    started = started_seconds(folder)
    result = load_result(folder)
    if result is None:
        unread = (folder / FILE_NAME).exists()
        return RunRecord(
            name, Outcome.unfinished, settings=settings, started=started, run_dir=str(folder),
            cwd=cwd, preset=settings.get("memory.preset"),
            detail=f"{FILE_NAME} cannot be read" if unread else "no result was written",
        )  # fmt: skip
    metrics = {key: value for key, value in result.metrics.items() if value is not None}
    memory = result.memory
    return RunRecord(
        name,
        result.outcome,
        metrics=metrics,
        described=described(result),
        monitor=result.monitor,
        fingerprint=result.data_fingerprint,
        settings=settings,
        preset=result.preset,
        device=result.device,
        precision=result.precision,
        meter=memory.get("meter"),
        predicted_peak_bytes=memory.get("predicted_peak_bytes"),
        peak_allocated_bytes=memory.get("peak_allocated_bytes"),
        peak_reserved_bytes=memory.get("peak_reserved_bytes"),
        prediction_error=memory.get("prediction_error"),
        budget_bytes=memory.get("budget_bytes"),
        seconds=result.seconds,
        weights=result.parameters,
        started=started,
        ended=(folder / FILE_NAME).stat().st_mtime,
        run_dir=str(folder),
        cwd=cwd,
        run_id=result.tracking.get("run_id"),
        detail=detail_of(result),
        partial=result.partial,
    )


def described(result: RunResult) -> dict[str, Metric]:
    """Return the metrics of a run by their bare names, also of one whose record describes none."""
    stored = [Metric.from_dict(one) for one in result.metrics_meta]
    known = [result.metric(name) for name in result.metrics if name.startswith(SPLITS)]
    return {metric.name: metric for metric in (*stored, *known)}


def detail_of(result: RunResult) -> str:
    """Return what went wrong, empty if nothing did."""
    if result.outcome is Outcome.completed:
        return ""
    return "ran out of memory" if result.outcome is Outcome.out_of_memory else result.stop_reason


def _settings(folder: Path) -> dict[str, str]:
    try:
        stored = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_NAME))
    except (OSError, YAMLError, OmegaConfBaseException):
        return {}
    return (
        flattened({str(key): value for key, value in stored.items()})
        if isinstance(stored, dict)
        else {}
    )


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the shortest names that tell the folders apart."""
    if len(folders) <= 1:
        return {folder: folder.name for folder in folders}
    depth = 1
    while True:
        names = {folder: "/".join(folder.parts[-depth:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            return names
        depth += 1
