"""A password in `tracking.uri` is in no file of a run, and what may hold one is its owner's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from expt.commands.fit_batch import command
from expt.uri import without_password

SECRET = "S3cr!t/x@y"
URI = 'tracking.uri="postgresql://me:${oc.env:LAB_PASSWORD}@127.0.0.1:9/db"'
LINE = (
    "memory=minimal", "debug=smoke", "trainer.progress=false", "model=stid", "memory.plan=false",
    "trainer.epochs=1", "trainer.test=false", "tracking.flush_seconds=0", URI,
)  # fmt: skip
PRIVATE = {"launch.json", "config.yaml", "hydra.yaml", "overrides.yaml", "multirun.yaml",
           "tracking.json", "tracking.jsonl", "expt.log"}  # fmt: skip


def files_with(folder: Path, text: str) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in paths if text.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "more",
    [
        ("hydra.run.dir=run",),
        ("-m", "trainer.seed=0,1", "hydra.sweep.dir=run"),
        ("-m", "search=debug", "search.n_trials=1", "search.presets=[]", "hydra.sweep.dir=run",
         "search.space={optimizer.lr:'choice(1e-3,1e-4)'}", "search.test_winner=false"),
    ],
    ids=["run", "grid", "search"],
)  # fmt: skip
def test_an_interpolated_password_is_written_nowhere(expt, home, monkeypatch, more) -> None:
    def silent(uri: str) -> None:
        raise OSError("nobody answers")

    # MLflow itself would try for a long time, also after this test.
    monkeypatch.setattr("expt.tracking.store.connect", silent)
    monkeypatch.setenv("LAB_PASSWORD", SECRET)
    code, out, err = expt(*LINE, *more, small=False)
    assert code == 0, err
    assert SECRET not in out + err
    for part in (SECRET, SECRET.partition("/")[0]):
        assert files_with(home, part) == []
    launch = next(iter(home.rglob("launch.json")))
    assert URI in json.loads(launch.read_text())["overrides"]
    for path in (home / "run").rglob("*"):
        if path.name in PRIVATE:
            assert path.stat().st_mode & 0o777 == 0o600, path
    if more[0] != "-m":  # what is not written down is asked for again
        code, out, err = expt("trainer.resume=run", "trainer.epochs=2", small=False)
        assert code == 0, err


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:S3cr!t/x@y@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:${oc.env:PW}@host/db", "postgresql://me:${oc.env:PW}@host/db"),
        ("postgresql://me:a${b}c@host/db", "postgresql://me:***@host/db"),
        ("http://host:5000/x@y", "http://host:5000/x@y"),
    ],
)
def test_what_is_shown_of_a_uri(uri, shown) -> None:
    assert without_password(uri) == shown


def test_a_refused_uri_is_shown_without_its_password(expt, home, monkeypatch) -> None:
    monkeypatch.setenv("LAB_PASSWORD", SECRET)
    code, out, err = expt(*LINE[:-1], URI.replace("postgresql", "postgress"), small=False)
    assert code == 2
    assert "tracking.uri='postgress://me:***@127.0.0.1:9/db' names no tracking server" in err
    assert "S3cr!t" not in out + err


def test_the_line_that_fit_batch_recommends_has_no_password() -> None:
    launch = {"overrides": ["model=stid", "tracking.uri=http://me:S3cr!t@host:5000"]}
    found = SimpleNamespace(batch_size=8, gradient_accumulation=2)
    line = command({**launch, "config_dir": None}, found, None)
    assert "tracking.uri=http://me:***@host:5000" in line and "S3cr!t" not in line
