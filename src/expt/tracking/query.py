"""Runs as an MLflow store has them: those of an experiment, or those nested under one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expt.tracking.store import CHANGED, PARENT_TAG, connect, reason
from expt.uri import sqlite_path, without_password

PAGE_SIZE = 1000


class NotThereError(Exception):
    """What was asked for is not in the store, or the store does not answer; says which."""


@dataclass(frozen=True)
class StoredRun:
    """One run; `metrics` and `parameters` are the last values.

    `started_seconds` is since the epoch.
    """

    run_id: str
    name: str
    status: str
    started_seconds: float
    metrics: Mapping[str, float]
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


def runs_of_experiment(uri: str, experiment: str, filter_string: str = "") -> list[StoredRun]:
    """Return an experiment's runs that a filter in MLflow's words lets through.

    Raises:
        NotThereError: no such experiment, no such store, or it does not understand the filter.

    """
    client = _open(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        known = [] if found else sorted(one.name for one in client.search_experiments())
    except Exception as error:
        raise _silent(uri, error) from error
    if found is None:
        names = ", ".join(known) or "none"
        raise NotThereError(f"there is no experiment {experiment!r}; there are: {names}")
    try:
        return _search(client, found.experiment_id, filter_string)
    except Exception as error:
        raise NotThereError(
            f"the runs of {experiment!r} cannot be searched with {filter_string!r}: {reason(error)}"
        ) from error


def runs_under(uri: str, run_id: str) -> list[StoredRun]:
    """Return the runs nested under a run, at any depth, or that run itself if there are none.

    Raises:
        NotThereError: no such run, or no such store.

    """
    from mlflow.exceptions import MlflowException

    client = _open(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotThereError(f"{_shown(uri)} has no run {run_id}") from error
        raise _silent(uri, error) from error
    except Exception as error:
        raise _silent(uri, error) from error
    if run.info.lifecycle_stage == "deleted":
        raise NotThereError(
            f"run {run_id} was deleted from {_shown(uri)}; mlflow runs restore --run-id {run_id} "
            "brings it back"
        )
    found: list[StoredRun] = []
    waiting = [run_id]
    while waiting:
        clause = f"tags.`{PARENT_TAG}` = '{waiting.pop()}'"
        try:
            children = _search(client, run.info.experiment_id, clause)
        except Exception as error:  # it went away meanwhile
            raise _silent(uri, error) from error
        found += children
        waiting += [child.run_id for child in children]
    return found or [_stored(run)]


def _open(uri: str) -> Any:
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        raise NotThereError(f"there is no tracking store {database}")
    try:
        return connect(uri)
    except Exception as error:
        raise _silent(uri, error) from error


def _search(client: Any, experiment_id: str, filter_string: str) -> list[StoredRun]:
    found: list[StoredRun] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string, max_results=PAGE_SIZE, page_token=token
        )
        found += [_stored(run) for run in page]
        token = page.token
        if not token:
            return found


def _stored(run: Any) -> StoredRun:
    # MLflow keeps the first value of a parameter, also of a run that went on with another.
    changed = {
        name.removeprefix(CHANGED): value
        for name, value in run.data.tags.items()
        if name.startswith(CHANGED)
    }
    return StoredRun(
        run.info.run_id,
        run.info.run_name or run.info.run_id,
        run.info.status,
        run.info.start_time / 1000,
        dict(run.data.metrics),
        {**run.data.params, **changed},
        dict(run.data.tags),
    )


def _silent(uri: str, error: Exception) -> NotThereError:
    return NotThereError(f"{_shown(uri)} does not answer: {reason(error)}")


def _shown(uri: str) -> str:
    return without_password(uri)
