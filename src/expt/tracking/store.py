"""What this package asks of MLflow, and MLflow's limits. Only this file and `search` import mlflow.

It is imported when a store is opened: the import takes 1.5 s, a new SQLite store 7 s. A metric
that is not finite needs no care: MLflow's SQL stores mark NaN and clip the infinities.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from expt.files import printable
from expt.locks import Lock
from expt.tracking.metric_tags import TAG_LENGTH
from expt.uri import sqlite_path, sqlite_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "expt.key"
"""Names a run before its id is known, so that it is created once."""
PARENT_TAG = "mlflow.parentRunId"
CHANGED = "expt.changed."
"""How the tag of a parameter begins that has another value since the run was resumed."""
NOTHING = "None"
"""The value of a parameter that is null, or not there any more."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Lets the UI open on training runs instead of its generative pages."""
METRICS_PER_CALL = 1000
_NAME_LENGTH = 250
_PARAMETER_LENGTH = 6000
_DIGEST_LENGTH = 36

_ENVIRONMENT = {
    # The sender has its own, slower retries; mlflow's would hold it for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class RefusedError(Exception):
    """The store will never take this record."""


class RunMissingError(Exception):
    """The store does not know the run, for instance because its database is a new one."""


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    step: int
    time: int
    """Milliseconds since the epoch."""


class MlflowStore:
    """An open MLflow store or server. Every method raises what MLflow raises, or the two above."""

    def __init__(self, uri: str) -> None:
        self._client = connect(uri)

    def open_run(
        self,
        experiment: str,
        artifact_root: str | None,
        key: str,
        name: str,
        time: int,
        tags: Mapping[str, str],
    ) -> str:
        """Return the id of the run with this key; create it (and its experiment) if need be."""
        from mlflow.entities import ViewType

        with _mlflow_errors():
            experiment_id = self._experiment(experiment, artifact_root)
            found = self._client.search_runs(
                [experiment_id], f"tags.`{KEY_TAG}` = '{key}'", ViewType.ALL, max_results=1
            )
            if found:
                return str(found[0].info.run_id)
            created = self._client.create_run(
                experiment_id,
                start_time=time,
                tags=_legal(tags, TAG_LENGTH) | {KEY_TAG: key},
                run_name=printable(name),
            )
            return str(created.info.run_id)

    def resume(self, run_id: str, parameters: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Set the run RUNNING, add new parameters and tags; return its experiment's id.

        MLflow never changes a parameter: another value for one is kept as the tag
        ``expt.changed.<name>``, and one that is not among `parameters` any more as null, unless
        there are none at all.
        """
        from mlflow.entities import Param

        with _mlflow_errors():
            run = self._client.get_run(run_id)
            if run.info.lifecycle_stage == "deleted":
                self._client.restore_run(run_id)
            if run.info.status != "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            known = run.data.params
            wanted = _legal(parameters, _PARAMETER_LENGTH)
            new = [Param(name, value) for name, value in wanted.items() if name not in known]
            self._client.log_batch(run_id, params=new)
            now = {name: wanted.get(name, NOTHING) for name in known} if wanted else {}
            changed = {
                f"{CHANGED}{name}": value
                for name, value in now.items()
                if run.data.tags.get(f"{CHANGED}{name}", known[name]) != value
            }
        self.tags(run_id, {**tags, **changed})
        return str(run.info.experiment_id)

    def dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Record what the run trains on as its input; the same is recorded once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name, where = printable(name), json.dumps({"uri": source})
        data = Dataset(name, digest[:_DIGEST_LENGTH], "local", where)
        tags = [InputTag("mlflow.data.context", "training")]
        with _mlflow_errors():
            self._client.log_inputs(run_id, [DatasetInput(data, tags)])

    def metrics(self, run_id: str, points: Sequence[Point]) -> None:
        """Add points; one that is already there is not added twice."""
        from mlflow.entities import Metric

        with _mlflow_errors():
            self._client.log_batch(
                run_id,
                metrics=[
                    Metric(_legal_name(point.name), point.value, point.time, point.step)
                    for point in points
                ],
            )

    def tags(self, run_id: str, values: Mapping[str, str]) -> None:
        """Set tags, replacing older values."""
        from mlflow.entities import RunTag

        with _mlflow_errors():
            legal = _legal(values, TAG_LENGTH)
            self._client.log_batch(
                run_id, tags=[RunTag(name, value) for name, value in legal.items()]
            )

    def artifact(self, run_id: str, path: str, folder: str) -> None:
        """Copy a file or folder into the run's artifacts."""
        with _mlflow_errors():
            self._client.log_artifact(run_id, path, _legal_name(folder) if folder else None)

    def answers(self) -> bool:
        """Tell whether the store can be read, whatever became of the last call."""
        try:
            self._client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def end(self, run_id: str, status: str, time: int) -> None:
        """Close the run."""
        with _mlflow_errors():
            self._client.set_terminated(run_id, status, time)

    def _experiment(self, name: str, artifact_root: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_root, EXPERIMENT_TAGS))
            except Exception:
                # Another process may have created it since.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def reason(error: BaseException) -> str:
    """Say in one line why a store did not take something, from the innermost cause known."""
    told = error
    for cause in _causes(error):
        if isinstance(cause, OSError | sqlite3.Error):
            told = cause
    text = str(told).strip().splitlines()
    return without_password(text[0][:300]) if text else type(told).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def connect(uri: str) -> MlflowClient:
    """Open a store or server, making the tables of a SQLite store that is not there yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # It logs the traceback of what it then raises, at every one of our attempts.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    database = sqlite_path(uri)
    if database is None:
        return MlflowClient(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    # MLflow does not guard the creation of its tables against a second process.
    lock = Lock(database.with_name(f"{database.name}.lock"))
    lock.acquire(wait=True)
    # MLflow makes the folder of the URI as it is spelled, where % and ? are still escaped.
    literal = Path(uri.removeprefix("sqlite:///"))
    made = [folder for folder in literal.parents if not folder.exists()]
    try:
        if not database.exists() or database.stat().st_size == 0:
            _create_database(database)
        return MlflowClient(uri)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        lock.release()


def _create_database(database: Path) -> None:
    # Under another name: the tables take seconds, and a kill half-way would leave a database
    # whose upgrade fails for ever.
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(f"{database.name}.new")
    for leftover in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        leftover.unlink(missing_ok=True)
    store = SqlAlchemyStore(  # type: ignore[no-untyped-call]
        sqlite_uri(unfinished), str(database.parent / "artifacts")
    )
    store.engine.dispose()
    unfinished.replace(database)


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DataError

    try:
        yield
    except Exception as error:
        code = error.error_code if isinstance(error, MlflowException) else None
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise RunMissingError(reason(error)) from error
        # Whatever else may be the store's fault, as a full disk is, and no record is given up
        # for it: MLflow has one code for that and for numbers that a database cannot hold.
        unfit = (UnicodeError, OverflowError, DataError)
        if code == "INVALID_PARAMETER_VALUE" or any(isinstance(c, unfit) for c in _causes(error)):
            raise RefusedError(reason(error)) from error
        raise


def _legal(values: Mapping[str, Any], length: int) -> dict[str, str]:
    return {_legal_name(name): printable(str(value))[:length] for name, value in values.items()}


def _legal_name(name: str) -> str:
    # Letters, digits, and "_ - . : /" and blanks, in the form of a normal relative path.
    parts = [part for part in re.sub(r"[^\w.\- :/]", "_", name).split("/") if part.strip(". ")]
    return "/".join(parts)[:_NAME_LENGTH].rstrip("/") or "_"
