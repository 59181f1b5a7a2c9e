"""Opens the Optuna study of a search: made, or found again and checked to be the same search.

Storage is a URL (``sqlite:///FILE``, ``postgresql://…``, ``mysql://…``) or a file that ends in
``.journal`` or ``.log``, which several processes may share, also over a network file system.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
from omegaconf import OmegaConf
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import Study, StudyDirection

from expt.config.moved import current
from expt.config.schema import MemoryConfig, TrainerConfig
from expt.config.search_node import PEAK
from expt.errors import ConfigError, StorageError, UserError
from expt.files import write_text
from expt.job import Metric
from expt.locks import Lock
from expt.run.process import identity
from expt.search.metric import ATTRIBUTE as METRIC
from expt.search.space import same
from expt.uri import absolute_uri, sqlite_path, sqlite_uri, without_password

log = logging.getLogger(__name__)

PREFIX = "expt."
"""Of the study's attributes that say which search it is."""
DATA = f"{PREFIX}data"
"""Attribute of a study: the fingerprint of the data that its trials share, where it is known."""
JOURNALS = (".journal", ".log")
SCHEMAS = {"trainer": TrainerConfig, "memory": MemoryConfig}
"""Groups whose settings have defaults that a study may not name."""
DATABASE_NAME = "optuna.db"
LOCK_WAIT_SECONDS = 60
"""For a SQLite file that another process writes to."""
CONNECT_SECONDS = 10
ATTEMPTS = 5
MADE_BY_ANOTHER = ("already exists", "duplicate key", "Duplicate entry")
"""Words of PostgreSQL and MySQL for a table, or its description, that another worker just made."""
DRIVERS = {
    "postgresql": "'expt[sql]'",
    "mysql": "pymysql, and write mysql+pymysql://",
}
NOT_A_STORAGE = (
    "search.storage={text} is neither a URL (sqlite:///FILE, postgresql://USER@HOST/NAME, "
    "mysql+pymysql://…) nor a file that ends in .journal or .log"
)


def default_storage(tracking_uri: str | None) -> str:
    """Return the URL of ``optuna.db`` beside the tracking store's file, else in ``outputs/``."""
    database = sqlite_path(tracking_uri) if tracking_uri else None
    folder = database.parent if database is not None else Path("outputs")
    return sqlite_uri((folder / DATABASE_NAME).absolute())


def absolute_storage(text: str) -> str:
    """Return a storage with its file's path made absolute, as it is written down."""
    return absolute_uri(text) if "://" in text else str(Path(text).absolute())


def connect_options(backend: str) -> dict[str, Any]:
    """Return SQLAlchemy's options for a database, among them how long to wait for it."""
    timeout = {"timeout": LOCK_WAIT_SECONDS}
    if backend != "sqlite":
        timeout = {"connect_timeout": CONNECT_SECONDS}
    return {"connect_args": timeout, "pool_pre_ping": True}


def open_storage(text: str) -> BaseStorage:
    """Open a storage, and make its tables or file if there are none.

    Raises:
        UserError: it cannot be reached, or was made by another version of Optuna.

    """
    if "://" not in text:
        if not text.endswith(JOURNALS):
            raise ConfigError(NOT_A_STORAGE.format(text=without_password(text)))
        try:
            Path(text).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(text))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"search.storage={text} cannot be used: {error}") from error
    database = sqlite_path(text)
    if database is None:
        return _open_database(text)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        problem = _file_problem(database)
        if problem is not None:
            raise UserError(f"search.storage={text}: {problem}")
        # Two processes that make the tables at the same time get in each other's way.
        lock = Lock(database.with_name(f"{database.name}.lock"))
        lock.acquire(wait=True)
    except OSError as error:
        raise UserError(f"search.storage={text} cannot be written: {error.strerror}") from error
    try:
        storage = _open_database(text)
        _enable_wal(storage)
        return storage
    finally:
        lock.release()


def _file_problem(path: Path) -> str | None:
    """Say why a file cannot be a SQLite database that is written to."""
    if path.is_dir():
        return f"this is a folder; name a file in it, like {sqlite_uri(path / DATABASE_NAME)}"
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        return "it may not be written; choose another file, or change its permissions"
    return None


def open_study(
    name: str,
    storage: BaseStorage,
    sampler: BaseSampler,
    pruner: BasePruner,
    objectives: Sequence[str],
    metric: Metric,
    identity: Mapping[str, Any],
) -> Study:
    """Make the study, or open the one of this name and check that it is the same search.

    Args:
        name: of the study.
        storage: where it is kept.
        sampler: suggests.
        pruner: ends trials early.
        objectives: what is compared, in order: the metric, and maybe the peak memory.
        metric: the first of them.
        identity: plain values that have to be what they were (``space``, ``budget_bytes``).

    Raises:
        ConfigError: it is another search, or its storage does not answer.

    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    wanted = {"objectives": list(objectives), **identity}
    goals = [
        StudyDirection.MINIMIZE if one == PEAK else StudyDirection[metric.direction.upper()]
        for one in objectives
    ]
    try:
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            sampler=sampler,
            pruner=pruner,
            directions=goals,
            load_if_exists=True,
        )
        attributes = study.user_attrs
        if study.directions != goals:
            begun, asked = (", ".join(one.name for one in d) for d in (study.directions, goals))
            raise ConfigError(
                f"search.study={name} was begun with the directions {begun}, and "
                f"search.objectives={list(objectives)} ask for {asked}; {_another(name)}"
            )
        problems = []
        for key, value in wanted.items():
            known = attributes.get(f"{PREFIX}{key}")
            if f"{PREFIX}{key}" not in attributes:
                if study.get_trials(deepcopy=False):
                    raise ConfigError(
                        f"search.study={name} holds trials that were not made by a search of this "
                        f"kind (it does not say its {key}); {_another(name)}"
                    )
                study.set_user_attr(f"{PREFIX}{key}", value)
            elif (difference := _difference(name, key, known, value)) is not None:
                problems.append(difference)
        if problems:
            raise ConfigError(problems)
        if METRIC not in attributes:
            study.set_user_attr(METRIC, metric.as_dict())
        return study
    except UserError:
        raise
    except Exception as error:
        raise _unusable(name, error) from error


def storage_failed(error: BaseException) -> bool:
    """Tell whether an exception means that the storage does not answer (any more)."""
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError)


@contextlib.contextmanager
def answering(name: str) -> Iterator[None]:
    """Say in one line that the study's storage went away, wherever in here that is noticed.

    Raises:
        StorageError: it did.

    """
    try:
        yield
    except Exception as error:
        if not storage_failed(error):
            raise
        raise StorageError(
            f"the storage of the study {name} does not answer any more "
            f"({without_password(str(error).splitlines()[0][:200])}); what was told before is "
            "safe. Start the same command again: it goes on with what is left"
        ) from error


def _open_database(url: str) -> RDBStorage:
    """Open a database with SQLAlchemy.

    Raises:
        UserError: as `open_storage`.

    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    shown = without_password(url)
    try:
        backend = make_url(url).get_backend_name()
    except ArgumentError as error:
        raise ConfigError(NOT_A_STORAGE.format(text=shown)) from error
    try:
        return _made(url, connect_options(backend))
    except ImportError as error:
        package = DRIVERS.get(backend, f"one for {backend}")
        raise UserError(
            f"search.storage={shown} needs a database driver that is not installed: pip install "
            f"{package}"
        ) from error
    except NoSuchModuleError as error:
        raise ConfigError(NOT_A_STORAGE.format(text=shown)) from error
    except RuntimeError as error:  # Optuna's word for tables of another version
        raise UserError(
            f"search.storage={shown} was made by another version of Optuna; bring it up to date "
            f"with: optuna storage upgrade --storage {shown}, or choose another search.storage "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        hint = "is the server running, and the address right?"
        if backend == "sqlite":
            hint = "the file may be damaged, or its disk full; choose another one"
        raise UserError(
            f"search.storage={shown} does not answer: {_innermost(error)}; {hint}"
        ) from error


def _made(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Open a database, again if another worker was making the same tables meanwhile."""
    from sqlalchemy.exc import DBAPIError

    for attempt in range(ATTEMPTS):
        try:
            return RDBStorage(url, engine_kwargs=engine_kwargs)
        except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
            said = str(getattr(error.__cause__, "orig", None) or error)
            if attempt == ATTEMPTS - 1 or not any(words in said for words in MADE_BY_ANOTHER):
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _enable_wal(storage: RDBStorage) -> None:
    """Let SQLite append to a log instead of waiting for the disk thirty times a trial.

    A process that is killed loses nothing by it; a power cut may take the last moments, and
    leaves a sound file (https://www.sqlite.org/pragma.html#pragma_synchronous).
    """
    from sqlalchemy import event

    def begin(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL").close()
        connection.execute("PRAGMA synchronous=NORMAL").close()

    storage.remove_session()
    storage.engine.dispose()
    event.listen(storage.engine, "connect", begin)


def _unusable(name: str, error: Exception) -> UserError:
    return UserError(f"search.study={name}: its storage does not answer: {_innermost(error)}")


def _innermost(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return without_password(lines[0][:300]) if lines else type(cause).__name__


def _another(name: str) -> str:
    return f"choose another name, like search.study={name}_2"


def _difference(name: str, key: str, known: Any, value: Any) -> str | None:
    """Say how a study differs from what it is asked to go on with, None if it does not.

    What an earlier version did not have yet was as the default is now.
    """
    if isinstance(known, dict) and isinstance(value, dict):
        changed = changed_settings(known, value)
        if not changed:
            return None
        what = f"another {key}: {', '.join(changed[:6])} {'differ' if changed[1:] else 'differs'}"
        if evenly := [one for one in changed if _drawn_evenly(known.get(one), value.get(one))]:
            what += (
                f" (an earlier version drew the range of {', '.join(evenly)} evenly in spite of "
                "tag(log,…); to go on, give it without the tag)"
            )
    elif same(known, value):
        return None
    else:
        what = f"{key}={known}, not {value}"
    return f"search.study={name} was begun with {what}; {_another(name)}"


def _drawn_evenly(known: Any, value: Any) -> bool:
    """Tell whether a distribution of a study differs by nothing but its logarithm."""
    try:
        then, now = known["attributes"], value["attributes"]
        return not then["log"] and now["log"] and {**then, "log": True} == now
    except (KeyError, TypeError):
        return False


def changed_settings(known: Mapping[str, Any], value: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that are not what they were, by this version's names."""
    names = known.keys() | value.keys()
    return sorted(name for name in names if not same(_now(known, name), _now(value, name)))


def _now(settings: Mapping[str, Any], name: str) -> Any:
    """Return a setting as this version has it: a class by its present name, else its default."""
    if name in settings:
        value = settings[name]
        return current(value) if isinstance(value, str) else value
    group, _, rest = name.partition(".")
    if group not in SCHEMAS:
        return None
    defaults = OmegaConf.to_container(OmegaConf.structured(SCHEMAS[group]), enum_to_str=True)
    return OmegaConf.select(OmegaConf.create(cast(dict[str, Any], defaults)), rest)


TOKEN_NAME, ATTRIBUTE = "study.token", "expt.folder"


def claim(study: Study, folder: Path) -> None:
    """Make `folder` the study's, or check that it is; to be called under the folder's lock.

    A folder that was removed on this machine may be begun anew. A study of an earlier version that
    has trials and does not say where has them in this one.

    Raises:
        ConfigError: the study's folder is another one, or this one holds another search.

    """
    known = study.user_attrs.get(ATTRIBUTE)
    here = {"path": str(folder), "host": identity()["host"]}
    path = folder / TOKEN_NAME
    token = path.read_text(encoding="utf-8").strip() if path.exists() else None
    if known is not None and token == known["token"]:
        return
    empty = token is None and not any(folder.glob("trial_*"))
    if (
        known is not None
        and not (empty and here.items() <= known.items())  # begun anew in its place
        and (known["host"] != here["host"] or Path(known["path"]).exists())
    ):
        raise ConfigError(
            f"the study {study.study_name} is kept in {known['path']} on {known['host']}, and "
            f"this is {folder}: workers of one study share one folder. Give "
            f"hydra.sweep.dir=FOLDER as it is seen from here, or, if it is gone, another "
            f"search.study={study.study_name}_2"
        )
    earlier = known is None and token is None and bool(study.get_trials(deepcopy=False))
    if not empty and not earlier:
        raise ConfigError(
            f"{folder} holds another search, whose trials would be taken for those of this one "
            f"(it is of another search.storage, or its study is gone); give another one, like "
            f"search.study={study.study_name}_2, or hydra.sweep.dir=FOLDER, or remove the folder"
        )
    token = uuid.uuid4().hex
    # The study first: killed in between, it finds its folder empty, and goes on.
    study.set_user_attr(ATTRIBUTE, {"token": token, **here})
    write_text(path, f"{token}\n")
