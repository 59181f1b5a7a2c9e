from __future__ import annotations

from pathlib import Path

import pytest

from expt.tracking.uri import (
    PASSWORD,
    PasswordMissingError,
    absolute_uri,
    is_server,
    sqlite_path,
    with_password,
    without_password,
)


def test_uris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///outputs/a.db?x=1") == f"sqlite:///{tmp_path}/outputs/a.db?x=1"
    assert absolute_uri("sqlite:////abs/a.db") == "sqlite:////abs/a.db"
    assert absolute_uri("http://host/path") == "http://host/path"
    assert is_server("https://host") and not is_server("sqlite:///a.db")
    assert without_password("postgresql://me:word@host/db") == "postgresql://me:***@host/db"
    assert without_password("http://127.0.0.1:5000/a@b") == "http://127.0.0.1:5000/a@b"


def test_a_hidden_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    assert with_password("http://me:word@host") == "http://me:word@host"
    with pytest.raises(PasswordMissingError, match=rf"http://me:\*\*\*@host .*{PASSWORD}"):
        with_password("http://me:***@host")
    monkeypatch.setenv(PASSWORD, "a@b/c")
    assert with_password("http://me:***@host/x") == "http://me:a%40b%2Fc@host/x"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:///outputs/mlflow.db", "outputs/mlflow.db"),
        ("sqlite:////data/mlflow.db?timeout=5", "/data/mlflow.db"),
        ("sqlite:///:memory:", None),
        ("postgresql://me@host/db", None),
        ("postgresql://me@/db?host=/run/postgresql", None),
        ("http://host:5000/?a=b", None),
    ],
)
def test_only_a_sqlite_uri_names_a_file(uri: str, path: str | None) -> None:
    assert sqlite_path(uri) == (None if path is None else Path(path))
