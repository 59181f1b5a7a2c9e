from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy import event

from expt.tracking.store import (
    CHANGED,
    MlflowStore,
    Point,
    RefusedError,
    RunMissingError,
    reason,
)
from expt.uri import sqlite_path, sqlite_uri


@pytest.fixture
def opened(uri: str) -> MlflowStore:
    return MlflowStore(uri)


def open_run(store: MlflowStore, root: Path, key: str | None = None) -> str:
    return store.open_run(
        "test-store", root.as_uri(), key or uuid.uuid4().hex, "name", 1_000, {"a": "b"}
    )


def test_a_key_names_one_run(opened: MlflowStore, tmp_path: Path, client: Any) -> None:
    first = open_run(opened, tmp_path, "one key")
    assert open_run(opened, tmp_path, "one key") == first
    assert open_run(opened, tmp_path, "another key") != first
    run = client.get_run(first)
    assert run.info.start_time == 1_000
    assert run.info.run_name == "name"
    assert run.data.tags["expt.key"] == "one key"


def test_a_parameter_that_changed_becomes_a_tag(
    opened: MlflowStore, tmp_path: Path, client: Any
) -> None:
    run_id = open_run(opened, tmp_path)
    opened.resume(run_id, {"lr": "0.1", "size": "3"}, {})
    opened.end(run_id, "FAILED", 2_000)
    opened.resume(run_id, {"lr": "0.2", "size": "3", "new": "1"}, {"t": "v"})
    run = client.get_run(run_id)
    assert run.data.params == {"lr": "0.1", "size": "3", "new": "1"}
    assert run.data.tags["expt.changed.lr"] == "0.2"
    assert "expt.changed.size" not in run.data.tags
    assert (run.data.tags["t"], run.info.status) == ("v", "RUNNING")


def test_the_tag_has_the_last_value_also_of_what_is_null_or_gone(
    opened: MlflowStore, tmp_path: Path, client: Any
) -> None:
    run_id = open_run(opened, tmp_path)
    opened.resume(run_id, {"lr": "0.1", "size": "3", "lora.rank": "8", "stop": "2"}, {})
    opened.resume(run_id, {"lr": "0.2", "size": "3", "lora": "None", "stop": "None"}, {})
    opened.resume(run_id, {}, {})  # whoever only ends it gives none
    tags = client.get_run(run_id).data.tags
    changed = {name: value for name, value in tags.items() if name.startswith(CHANGED)}
    gone = {f"{CHANGED}lora.rank": "None", f"{CHANGED}stop": "None"}
    assert changed == {f"{CHANGED}lr": "0.2", **gone}
    opened.resume(run_id, {"lr": "0.1", "size": "3", "lora": "None", "stop": "None"}, {})
    assert client.get_run(run_id).data.tags[f"{CHANGED}lr"] == "0.1"


def test_names_and_values_out_of_bounds_are_made_to_fit(
    opened: MlflowStore, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    run_id = open_run(opened, tmp_path)
    opened.resume(run_id, {"a=[b]": "x" * 9000, "n" * 400: "1"}, {"//t/../u": "y" * 9000})
    opened.metrics(run_id, [Point("mae@15/min%", 1.0, 0, 5), Point("..", 2.0, 0, 5)])
    data = client.get_run(run_id).data
    assert data.params == {"a__b_": "x" * 6000, "n" * 250: "1"}
    assert data.tags["t/u"] == "y" * 8000
    assert data.metrics == {"mae_15/min_": 1.0, "_": 2.0}


def test_metrics_that_are_not_finite_arrive_once(
    opened: MlflowStore, tmp_path: Path, client: Any
) -> None:
    run_id = open_run(opened, tmp_path)
    values = [float("nan"), float("inf"), float("-inf")]
    points = [Point("loss", value, step, 7) for step, value in enumerate(values)]
    for _ in range(2):
        opened.metrics(run_id, points)
    history = client.get_metric_history(run_id, "loss")
    assert [point.step for point in history] == [0, 1, 2]
    assert history[0].value != history[0].value
    assert history[1].value > 1e308 and history[2].value < -1e308


def test_an_artifact_stays_below_its_run(opened: MlflowStore, tmp_path: Path, client: Any) -> None:
    run_id = open_run(opened, tmp_path)
    opened.artifact(run_id, str(Path(__file__)), "../outside")
    assert [file.path for file in client.list_artifacts(run_id)] == ["outside"]


def test_refusals_are_told_apart(opened: MlflowStore, tmp_path: Path, client: Any) -> None:
    with pytest.raises(RunMissingError):
        opened.tags("0" * 32, {"a": "b"})
    run_id = open_run(opened, tmp_path)
    with pytest.raises(RefusedError):
        opened.metrics(run_id, [Point("loss", 1.0, 2**70, 7)])
    client.delete_run(run_id)
    with pytest.raises(RefusedError):
        opened.tags(run_id, {"a": "b"})


def test_names_of_files_in_another_encoding_are_taken_as_escapes(
    opened: MlflowStore, tmp_path: Path, client: Any
) -> None:
    name = os.fsdecode(b"caf\xe9.h5")
    root = (tmp_path / "a").as_uri()
    run_id = opened.open_run("test-store", root, uuid.uuid4().hex, name, 1, {"first": name})
    opened.resume(run_id, {"path": name}, {name: name})
    opened.dataset(run_id, name, "1", name)
    stored = client.get_run(run_id)
    assert stored.info.run_name == stored.data.tags["first"] == r"caf\udce9.h5"
    assert stored.data.params["path"] == stored.data.tags["caf_.h5"] == r"caf\udce9.h5"


def test_a_database_that_cannot_grow_or_be_written_refuses_nothing(
    uri: str, tmp_path: Path
) -> None:
    shutil.copy(sqlite_path(uri) or "", tmp_path / "mlflow.db")
    opened = MlflowStore(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = open_run(opened, tmp_path)
    points = [Point("loss", 1.0, step, 7) for step in range(1000)]
    pragma = [""]

    @event.listens_for(opened._client._tracking_client.store.engine, "checkout")
    def limit(connection: Any, *more: Any) -> None:
        connection.execute(pragma[0])

    for name, limit, none in (("max_page_count", 1, 10**6), ("query_only", 1, 0)):
        pragma[0] = f"PRAGMA {name}={limit}"
        with pytest.raises(MlflowException, match=r"full|readonly"):
            opened.metrics(run_id, points)
        pragma[0] = f"PRAGMA {name}={none}"
        assert opened.answers()
    opened.metrics(run_id, points)


def test_what_was_deleted_in_the_store_is_restored(
    opened: MlflowStore, tmp_path: Path, client: Any
) -> None:
    run_id = open_run(opened, tmp_path, "deleted")
    client.delete_run(run_id)
    assert open_run(opened, tmp_path, "deleted") == run_id
    opened.resume(run_id, {}, {})
    opened.metrics(run_id, [Point("loss", 1.0, 0, 7)])
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    assert open_run(opened, tmp_path) != run_id


def open_both(arguments: list[str]) -> int:
    uri, key = arguments
    print(MlflowStore(uri).open_run("both", None, key, "n", 1, {}))
    return 0


def test_two_processes_may_make_one_store_and_experiment(tmp_path: Path, forked: Any) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    (tmp_path / "new").mkdir()
    # What a process that was killed while it made the tables leaves behind.
    (tmp_path / "new" / "mlflow.db.new").write_bytes(b"half a database")
    running = [forked.start(uri, key, run=open_both) for key in ("first", "second")]
    codes, said = zip(*map(forked.ended, running), strict=True)
    assert codes == (0, 0), said
    assert [len(lines.splitlines()) for lines in said] == [1, 1], "nothing but the run's number"
    assert len(set(said)) == 2
    from mlflow import MlflowClient

    names = [experiment.name for experiment in MlflowClient(uri).search_experiments()]
    assert sorted(names) == ["Default", "both"]
    assert not (tmp_path / "new" / "mlflow.db.new").exists()


@pytest.mark.parametrize("others", [[], ["my%2520lab"]])
def test_a_store_is_in_the_folder_that_is_named_and_leaves_no_other(
    uri: str, tmp_path: Path, others: list[str]
) -> None:
    database = tmp_path / "my%20lab" / "mlflow.db"
    database.parent.mkdir()
    for other in others:  # empty, and the user's own
        (tmp_path / other).mkdir()
    shutil.copy(sqlite_path(uri) or "", database)
    opened = MlflowStore(sqlite_uri(database))
    run_id = open_run(opened, tmp_path)
    with closing(sqlite3.connect(database)) as rows:
        assert rows.execute("select 1 from runs where run_uuid = ?", [run_id]).fetchall()
    assert {path.name for path in tmp_path.iterdir()} == {"my%20lab", *others}


def test_the_reason_is_the_innermost_cause_in_one_line() -> None:
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError:
            raise ValueError("HTTPConnectionPool\nand more") from None
    except ValueError as error:
        assert reason(error) == "[Errno 111] Connection refused"
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
