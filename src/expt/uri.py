"""URIs of tracking servers and databases: what kind they are, and their passwords.

A password is for the process that was given it. What is written down or shown has ``***`` in its
place, and a later process takes it from ``MLFLOW_TRACKING_PASSWORD``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

PASSWORD = "MLFLOW_TRACKING_PASSWORD"
"""MLflow's own environment variable for the password of a server."""
HIDDEN = "***"
IN_AUTHORITY = re.compile(
    r"(://[^:/\s\[]*):(?!\$\{[^}]*\}@)(?:[^/?#\s]*@|(?!\d+(?:[/?#\s]|$))[^\s\"']*@)",
)
"""A password before the host. One that was not escaped may hold ``@`` or ``/``; a port does not.
A user may hold ``@``, as in ``me@server``: SQLAlchemy takes it. An interpolation, as in
``://me:${oc.env:PASSWORD}@``, is no password yet."""
IN_QUERY = re.compile(r"([?&]\w*(?:password|passwd|pwd)\\?=)[^&#\s\"']*", re.IGNORECASE)
"""One among the options, as ``?password=``; on a command line ``=`` may be escaped."""


class PasswordMissingError(Exception):
    """A URI was written down without its password, and the environment does not have it."""


def sqlite_uri(database: Path) -> str:
    """Return the URI of a database file, with ``%`` and ``?`` escaped, which mean something in it.

    Nothing else is: `sqlite_path` of a URI that somebody typed is the file that they mean.
    """
    return f"sqlite:///{str(database).replace('%', '%25').replace('?', '%3F')}"


def absolute_uri(uri: str) -> str:
    """Return a SQLite URI with the path made absolute, so that a later chdir changes nothing."""
    database = sqlite_path(uri)
    if database is None:
        return uri
    _, mark, query = uri.partition("?")
    return f"{sqlite_uri(database.absolute())}{mark}{query}"


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a ``sqlite:///`` URI as SQLAlchemy does, None for any other."""
    scheme, _, rest = uri.partition(":///")
    path = unquote(rest.partition("?")[0])
    return Path(path) if scheme == "sqlite" and path not in ("", ":memory:") else None


def is_server(uri: str) -> bool:
    """Tell whether a server, not this process, decides where artifacts go."""
    return urlsplit(uri).scheme in ("http", "https", "databricks", "databricks-uc", "uc")


def without_password(uri: str) -> str:
    """Return the URI as it may be shown, or any text with URIs in it."""
    return IN_QUERY.sub(rf"\1{HIDDEN}", IN_AUTHORITY.sub(rf"\1:{HIDDEN}@", uri))


def shown_lines(lines: Iterable[str]) -> list[str]:
    """Return the settings of a command line as they may be shown."""
    return [without_password(line) for line in lines]


def with_password(uri: str) -> str:
    """Return the URI as it can be connected to.

    Raises:
        PasswordMissingError: the password is hidden, and the environment does not have it.

    """
    if without_password(uri) != uri or HIDDEN not in uri:
        return uri
    password = os.environ.get(PASSWORD)
    if not password:
        raise PasswordMissingError(
            f"the password of {uri} is never written down; set {PASSWORD} and try again"
        )
    return uri.replace(HIDDEN, quote(password, safe=""))
