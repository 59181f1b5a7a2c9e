from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from expt.uri import (
    PASSWORD,
    PasswordMissingError,
    absolute_uri,
    is_server,
    sqlite_path,
    sqlite_uri,
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
    assert without_password("http://[::1]:5000/a@b") == "http://[::1]:5000/a@b"
    assert without_password("http://127.0.0.1:5000/a@b") == "http://127.0.0.1:5000/a@b"
    assert without_password("http://me@host:5000/a@b") == "http://me@host:5000/a@b"


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
        ("sqlite:///my%20lab/a%25b.db", "my lab/a%b.db"),
        ("sqlite:///my lab/a%b#c.db", "my lab/a%b#c.db"),
        ("sqlite:///:memory:", None),
        ("postgresql://me@host/db", None),
        ("postgresql://me@/db?host=/run/postgresql", None),
        ("http://host:5000/?a=b", None),
    ],
)
def test_only_a_sqlite_uri_names_a_file(uri: str, path: str | None) -> None:
    assert sqlite_path(uri) == (None if path is None else Path(path))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:se@cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se/cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se?cret@host/db", "postgresql://me:***@host/db"),
        ("mysql://:secret@host:3306/db", "mysql://:***@host:3306/db"),
        ("postgresql://me:12secret@host/a@b", "postgresql://me:***@host/a@b"),
        ("postgresql://me@server:secret@host/db", "postgresql://me@server:***@host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ("postgresql://h/db?password=secret&a=b", "postgresql://h/db?password=***&a=b"),
        ('search.storage="mysql://h/db?PASSWD=secret"', 'search.storage="mysql://h/db?PASSWD=***"'),
        (r"search.storage=mysql://h/db?sslpassword\=secret", r"search.storage=mysql://h/db?sslpassword\=***"),
        ("a://u:secret@h and b://v:secret@i", "a://u:***@h and b://v:***@i"),
    ],
)  # fmt: skip
def test_no_password_is_shown_however_it_is_written(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
    assert without_password(shown) == shown


def test_a_password_among_the_options_comes_from_the_environment_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PASSWORD, "a&b")
    assert with_password("http://host/?password=***") == "http://host/?password=a%26b"
    assert with_password("http://host/?password=word") == "http://host/?password=word"


@pytest.mark.parametrize("name", ["a b", "a%20b", "a%b", "a?b", "a#b", "ü[1]", "a%3Fb?"])
def test_a_folder_of_any_name_has_the_database_that_sqlalchemy_opens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    database = tmp_path / name / "x.db"
    uri = sqlite_uri(database)
    assert sqlite_path(uri) == database
    assert absolute_uri("sqlite:///x.db") == absolute_uri(uri) == uri
    assert make_url(f"{uri}?timeout=5").database == str(database)
