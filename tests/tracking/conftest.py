from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expt.tracking import sender as sender_module
from expt.tracking.mlflow import MlflowTracker
from expt.tracking.store import MlflowStore


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests: a new one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    MlflowStore(uri)
    return uri


@pytest.fixture
def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture
def make(uri: str, tmp_path: Path) -> Iterator[Callable[..., MlflowTracker]]:
    """Make trackers on ``tmp_path/<name>``; they are closed after the test."""
    made: list[MlflowTracker] = []

    def make(name: str = "run", **changes: Any) -> MlflowTracker:
        arguments = {
            "uri": uri,
            "experiment": "test",
            "directory": tmp_path / name,
            "artifact_root": tmp_path / "artifacts",
        }
        made.append(MlflowTracker(**arguments | changes))
        return made[-1]

    yield make
    for tracker in made:
        tracker.close()


class FakeStore:
    """Takes everything and remembers it; fails as often as `failures` says.

    It answers unless the last failure was a ConnectionError.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.opened = 0
        self.failures: list[Exception] = []
        self.alive = True

    def _call(self, name: str, value: Any) -> None:
        if self.failures:
            error = self.failures.pop(0)
            self.alive = not isinstance(error, ConnectionError)
            raise error
        self.alive = True
        self.calls.append((name, value))

    def open_run(self, experiment: str, root: str, key: str, name: str, *rest: Any) -> str:
        self._call("open", name)
        self.opened += 1
        return f"id-{name}-{self.opened}"

    def resume(self, run_id: str, parameters: Any, tags: Any) -> None:
        self._call("resume", dict(tags))

    def metrics(self, run_id: str, points: Any) -> None:
        self._call("metrics", list(points))

    def tags(self, run_id: str, values: Any) -> None:
        self._call("tags", dict(values))

    def artifact(self, run_id: str, path: str, folder: str) -> None:
        self._call("artifact", path)

    def answers(self) -> bool:
        return self.alive

    def end(self, run_id: str, status: str, time: int) -> None:
        self._call("end", status)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """Every sender of the test gets this store."""
    store = FakeStore()
    monkeypatch.setattr(sender_module, "MlflowStore", lambda uri: store)
    return store
