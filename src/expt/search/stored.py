"""Opens the study of a search that is there already, for reading: by what its summary says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.search.winner import SweepSummary
from expt.uri import HIDDEN, sqlite_path

if TYPE_CHECKING:
    from optuna.study import Study

PASSWORD = f":{HIDDEN}@"
NO_PASSWORD = (
    "; its password is never written down: for PostgreSQL, set PGPASSWORD or write it to ~/.pgpass"
)


class StudyError(Exception):
    """A study cannot be read; the message says which and why, for a note in the report."""


def load(summary: SweepSummary) -> Study:
    """Open the study of a search for reading.

    Raises:
        StudyError: it is not there.

    """
    import optuna

    where = summary.storage
    if where is None:
        raise StudyError(f"the search {summary.study} does not say where its study is stored")
    database = sqlite_path(where) if "://" in where else Path(where)
    if database is not None and not database.exists():
        raise StudyError(f"the study {summary.study} is not read: there is no file {database}")
    try:
        return optuna.load_study(study_name=summary.study, storage=_storage(where))
    except Exception as error:  # whatever a database driver raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = NO_PASSWORD if PASSWORD in where else ""
        raise StudyError(f"the study {summary.study} cannot be read: {first}{hint}") from error


def _storage(where: str) -> Any:
    if "://" in where:
        from optuna.storages import RDBStorage
        from sqlalchemy.engine import make_url

        from expt.search.study import connect_options

        url = where.replace(PASSWORD, "@")  # so that the driver looks for it where it may
        return RDBStorage(url, engine_kwargs=connect_options(make_url(url).get_backend_name()))
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(where))
