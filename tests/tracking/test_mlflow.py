from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expt.tracking.journal import JOURNAL, STATE, Journal, State
from expt.tracking.mlflow import MlflowTracker
from expt.tracking.replay import replay
from expt.tracking.tracker import NullTracker, Tracker
from expt.uri import sqlite_path

Make = Callable[..., MlflowTracker]


def steps(client: Any, tracker: Tracker, name: str = "loss") -> list[int]:
    return [point.step for point in client.get_metric_history(tracker.run_id, name)]


def journal_of(directory: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (directory / JOURNAL).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def messages(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [entry.message for entry in caplog.records if text in entry.message]


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


@pytest.fixture
def dead_uri() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_everything_arrives(make: Make, client: Any, tmp_path: Path) -> None:
    tracker: Tracker = make()
    (tmp_path / "plot.png").write_bytes(b"png")
    tracker.start("name", {"model": {"width": 3, "layers": [1, 2], "x": {}}, "n": None}, {"p": "q"})
    for step in range(3):
        tracker.metrics({"loss": step / 2, "nan": float("nan"), "inf": float("inf")}, step)
    tracker.tags({"preset": "lite"})
    tracker.artifact(tmp_path / "plot.png", "plots")
    assert tracker.finish("FINISHED")

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "name"
    assert run.data.params == {
        "model.width": "3",
        "model.layers": "[1, 2]",
        "model.x": "{}",
        "n": "None",
    }
    assert run.data.tags["p"] == "q" and run.data.tags["preset"] == "lite"
    assert run.data.tags["mlflow.user"] and run.data.tags["mlflow.source.name"]
    points = client.get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    nan = client.get_metric_history(tracker.run_id, "nan")
    assert len(nan) == 3 and all(point.value != point.value for point in nan)
    assert steps(client, tracker, "inf") == [0, 1, 2]
    artifacts = client.list_artifacts(tracker.run_id, "plots")
    assert [artifact.path for artifact in artifacts] == ["plots/plot.png"]

    records = journal_of(tmp_path / "run")
    assert run.info.start_time == records[1]["time"]
    assert run.info.end_time == records[-1]["time"]
    assert points[0].timestamp == records[2]["time"]
    state = json.loads((tmp_path / "run" / STATE).read_text())
    assert (state["applied"], state["run_id"]) == (len(records), tracker.run_id)


def test_another_process_goes_on_with_the_same_run(make: Make, client: Any) -> None:
    first = make()
    first.start("name", {"lr": 0.1}, {})
    first.metrics({"loss": 1.0}, 1)
    assert first.flush()
    first.metrics({"loss": float("nan"), "seconds": 1.0}, 2)
    first.close()

    second = make()
    second.start("name", {"lr": 0.2, "new": 1}, {})
    second.metrics({"loss": float("nan"), "seconds": 2.0}, 2)  # a redone step
    second.metrics({"loss": 0.5}, 3)
    assert second.flush()
    assert client.get_run(second.run_id).info.status == "RUNNING"
    assert second.finish("KILLED")

    assert second.run_id == first.run_id is not None
    assert steps(client, second) == [1, 2, 3]
    # The same step with another value is a fact of its own.
    assert steps(client, second, "seconds") == [2, 2]
    run = client.get_run(second.run_id)
    assert run.data.params == {"lr": "0.1", "new": "1"}
    assert run.data.tags["expt.changed.lr"] == "0.2"
    assert run.info.status == "KILLED"


def test_a_finished_run_is_running_again_when_it_goes_on(make: Make, client: Any) -> None:
    for status, now in (("FAILED", "FAILED"), (None, "RUNNING"), ("FINISHED", "FINISHED")):
        tracker = make()
        tracker.start("name", {}, {})
        assert tracker.finish(status) if status else tracker.flush()  # type: ignore[arg-type]
        tracker.close()
        assert client.get_run(tracker.run_id).info.status == now


def test_a_kill_between_creation_and_state_makes_no_second_run(make: Make, tmp_path: Path) -> None:
    first = make()
    first.start("name", {}, {})
    assert first.flush()
    first.close()
    (tmp_path / "run" / STATE).unlink()
    second = make()
    second.start("name", {}, {})
    assert second.finish("FINISHED")
    assert second.run_id == first.run_id


def test_a_killed_process_loses_and_doubles_nothing(
    make: Make, uri: str, client: Any, tmp_path: Path
) -> None:
    program = (
        "import sys, itertools, time; from pathlib import Path\n"
        "from expt.tracking.mlflow import MlflowTracker\n"
        "uri, run = sys.argv[1:]\n"
        "tracker = MlflowTracker(uri, 'test', Path(run), None)\n"
        "tracker.start('killed', {}, {})\n"
        "for step in itertools.count():\n"
        "    tracker.metrics({'loss': step / 3}, step); time.sleep(0.001)\n"
        "    if step % 50 == 0: tracker.flush(); print(step, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, uri, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "150\n":
            assert process.poll() is None
        process.kill()
    with (tmp_path / "run" / JOURNAL).open("ab") as file:
        file.write(b'{"kind":"metr')
    before = State.load(tmp_path / "run")
    assert before is not None

    tracker = make()
    tracker.start("killed", {}, {})
    for step in range(100, 300):
        tracker.metrics({"loss": step / 3}, step)
    assert tracker.finish("FINISHED")
    assert tracker.run_id == before.run_id
    assert steps(client, tracker) == list(range(300))


def test_a_child_finds_its_parent_when_it_appears(
    make: Make, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(tmp_path / "sweep", {"parent": None}).append("tags", {"values": {}})
    child = make("sweep/0", parent_directory=tmp_path / "sweep")
    child.start("child", {}, {})
    time.sleep(0.5)
    assert child.run_id is None
    parent = make("sweep")
    parent.start("parent", {}, {})
    assert child.finish("FINISHED")
    assert parent.finish("FINISHED")
    assert child.parent_run_id == parent.run_id is not None
    tags = client.get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id
    assert parent.parent_run_id is None
    assert caplog.records == []


def test_a_dead_server_costs_little_and_replay_sends_what_it_missed(
    make: Make,
    uri: str,
    dead_uri: str,
    client: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = make(uri=dead_uri)
    began = time.monotonic()
    tracker.start("name", {"a": 1}, {})
    for step in range(200):
        tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - began < 1
    until(lambda: messages(caplog, "does not answer"))
    began = time.monotonic()
    assert not tracker.finish("FINISHED")
    assert time.monotonic() - began < 5
    assert [entry.message for entry in caplog.records] == [
        f"tracking server {dead_uri} does not answer ([Errno 111] Connection refused); records "
        f"are kept in {tmp_path}/run/tracking.jsonl and sent later",
        f"some tracking records have not reached {dead_uri}; they are kept in "
        f"{tmp_path}/run/tracking.jsonl. When this process has ended and the store answers: "
        "python -m expt task=replay",
    ]

    assert not replay(tmp_path).complete
    state = State.load(tmp_path / "run")
    assert state is not None
    state.uri = uri
    state.save(tmp_path / "run")
    report = replay(tmp_path)
    assert report.complete and report.directories[0].sent == 202
    state = State.load(tmp_path / "run")
    assert state is not None
    records = journal_of(tmp_path / "run")
    run = client.get_run(state.run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", records[-1]["time"])
    points = client.get_metric_history(state.run_id, "loss")
    assert [point.timestamp for point in points] == [record["time"] for record in records[2:-1]]


def test_a_short_run_does_not_wait_for_a_dead_server(make: Make, dead_uri: str) -> None:
    tracker = make(uri=dead_uri)
    tracker.start("name", {}, {})
    began = time.monotonic()
    assert not tracker.finish("FINISHED")
    assert time.monotonic() - began < 5


def test_flush_waits_no_longer_than_told(make: Make, store: Any) -> None:
    store.resume = lambda *arguments: time.sleep(1.5)
    tracker = make(flush_seconds=0.2)
    tracker.start("name", {}, {})
    began = time.monotonic()
    assert not tracker.flush()
    assert 0.15 < time.monotonic() - began < 1


def test_a_store_that_comes_back_gets_everything(
    make: Make, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expt")
    (tmp_path / "folder").write_text("in the way")
    tracker = make(uri=f"sqlite:///{tmp_path}/folder/mlflow.db")
    tracker.start("name", {}, {})
    tracker.metrics({"loss": 1.0}, 0)
    until(lambda: messages(caplog, "does not answer"))
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    shutil.copy(sqlite_path(uri) or "", tmp_path / "folder" / "mlflow.db")
    until(lambda: messages(caplog, "is back"))
    assert tracker.finish("FINISHED")
    assert len(caplog.records) == 2
    from mlflow import MlflowClient

    assert steps(MlflowClient(tracker.uri), tracker) == [0]


def test_a_full_disk_is_told_once_and_stops_nothing(
    make: Make,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = make()
    with monkeypatch.context() as context:
        context.setattr(os, "write", full)
        tracker.start("name", {}, {})
        tracker.metrics({"loss": 1.0}, 0)
        assert not tracker.flush()
    tracker.metrics({"loss": 1.0}, 1)
    assert not tracker.finish("FINISHED")  # not everything
    assert steps(client, tracker) == [1]
    assert len(messages(caplog, "No space left on device")) == len(caplog.records) == 1


def test_an_unwritable_place_is_told_once_and_stops_nothing(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    tracker = make("file/run")
    tracker.start("name", {}, {})
    tracker.metrics({"loss": 1.0}, 0)
    assert not tracker.finish("FAILED")
    assert len(messages(caplog, "cannot write")) == len(caplog.records) == 1


def test_recording_a_metric_costs_less_than_200_microseconds(make: Make) -> None:
    tracker = make()
    tracker.start("name", {}, {})
    rounds = []
    for number in range(5):
        began = time.perf_counter()
        for step in range(400):
            tracker.metrics({"train/loss": 1.0, "train/lr": 1e-3}, 400 * number + step)
        rounds.append((time.perf_counter() - began) / 400)
    assert min(rounds) < 200e-6  # in the others, another process may have had the core


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_a_process_that_just_ends_does_so_in_silence(
    seconds: float, uri: str, tmp_path: Path
) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from expt.tracking.mlflow import MlflowTracker\n"
        "assert 'mlflow' not in sys.modules\n"
        "tracker = MlflowTracker(sys.argv[1], 'test', Path(sys.argv[2]), None)\n"
        "tracker.start('name', {}, {}); time.sleep(float(sys.argv[3]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, uri, str(tmp_path), str(seconds)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_relative_database_stays_where_it_was(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(uri="sqlite:///outputs/m.db").uri == f"sqlite:///{tmp_path}/outputs/m.db"


def test_the_null_tracker_is_a_tracker(tmp_path: Path) -> None:
    tracker: Tracker = NullTracker()
    tracker.start("name", {}, {})
    tracker.metrics({"loss": 1.0}, 0)
    tracker.tags({"a": "b"})
    tracker.artifact(tmp_path / "missing")
    assert tracker.flush() and tracker.finish("FINISHED")
    assert tracker.uri is tracker.run_id is tracker.parent_run_id is None
