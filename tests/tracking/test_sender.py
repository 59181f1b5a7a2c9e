from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expt.tracking import sender as artifacts
from expt.tracking.journal import JOURNAL, STATE, Journal, State, is_closed
from expt.tracking.sender import NotReadyError, Sender, Target
from expt.tracking.store import RefusedError, RunMissingError

HEADER = {"uri": "http://server", "experiment": "e", "artifact_root": None, "parent": None}


def record(directory: Path, steps: int = 3, values: int = 1, **header: Any) -> Journal:
    journal = Journal(directory, HEADER | header)
    journal.append("start", {"name": directory.name, "parameters": {}, "tags": {}})
    for step in range(steps):
        metrics = {f"m{number}": float(step) for number in range(values)}
        journal.append("metrics", {"step": step, "values": metrics})
    journal.append("end", {"status": "FINISHED"})
    return journal


def send(sender: Sender) -> None:
    while sender.send_group():
        pass


def applied(directory: Path) -> int:
    state = State.load(directory)
    assert state is not None
    return state.applied


def test_records_arrive_in_order_and_metrics_together(tmp_path: Path, store: Any) -> None:
    journal = record(tmp_path)
    journal.append("tags", {"values": {"a": "b"}})
    sender = Sender(tmp_path)
    send(sender)
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics", "end", "tags"]
    assert [point.step for point in store.calls[2][1]] == [0, 1, 2]
    assert applied(tmp_path) == 7
    assert sender.position == journal.end
    assert sender.outstanding() == 0


def test_no_call_holds_more_than_a_thousand_points(tmp_path: Path, store: Any) -> None:
    record(tmp_path, steps=30, values=90)
    send(Sender(tmp_path))
    sizes = [len(value) for name, value in store.calls if name == "metrics"]
    assert sizes == [990, 990, 720]


def test_what_failed_is_sent_again_and_only_that(tmp_path: Path, store: Any) -> None:
    record(tmp_path)
    sender = Sender(tmp_path)
    assert sender.send_group()
    store.failures = [ConnectionError("gone")]
    with pytest.raises(ConnectionError):
        sender.send_group()
    assert applied(tmp_path) == 2
    sender.close()
    send(Sender(tmp_path))
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics", "end"]


def test_one_refused_record_does_not_hold_up_the_others(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path)
    sender = Sender(tmp_path)
    sender.send_group()
    store.failures = [RefusedError("bad batch"), RefusedError("bad step 0")]
    send(sender)
    sent = [value for name, value in store.calls if name == "metrics"]
    assert [[point.step for point in points] for points in sent] == [[1, 2]]
    assert applied(tmp_path) == 6
    assert [entry.message for entry in caplog.records] == [
        "the store refused a record of metrics, it is skipped: bad step 0"
    ]


def test_what_fails_for_want_of_room_waits_though_the_store_answers(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = store.metrics

    def nearly_full(run_id: str, points: Any) -> None:
        if len(points) > 1:
            raise OSError("database or disk is full")
        taken(run_id, points)

    monkeypatch.setattr(store, "metrics", nearly_full)
    record(tmp_path, steps=400)
    sender = Sender(tmp_path)
    sender.send_group()
    for _ in range(3):
        with pytest.raises(OSError, match="full"):
            sender.send_group()
    assert store.answers() and applied(tmp_path) == 2 and caplog.records == []
    monkeypatch.setattr(store, "metrics", taken)
    send(sender)
    assert [len(points) for name, points in store.calls if name == "metrics"] == [400]


def test_a_refused_record_among_a_thousand_is_found_in_few_calls(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, calls = store.metrics, []

    def picky(run_id: str, points: Any) -> None:
        calls.append(len(points))
        if any(point.step == 700 for point in points):
            raise RefusedError("bad")
        taken(run_id, points)

    monkeypatch.setattr(store, "metrics", picky)
    record(tmp_path, steps=1000)
    send(Sender(tmp_path))
    stored = [p.step for name, points in store.calls if name == "metrics" for p in points]
    assert stored == [step for step in range(1000) if step != 700]
    assert len(calls) < 25
    assert store.calls[-1] == ("end", "FINISHED")


def test_parameters_that_the_store_cannot_take_do_not_hold_up_the_figures(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*values: Any) -> None:
        raise RefusedError("too long")

    record(tmp_path)
    sender = Sender(tmp_path)
    monkeypatch.setattr(store, "resume", refuse)
    send(sender)
    assert [name for name, _ in store.calls] == ["open", "metrics", "end"]


def test_a_run_the_store_lost_is_sent_again_whole(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path)
    sender = Sender(tmp_path)
    sender.send_group()
    sender.send_group()
    store.failures = [RunMissingError("no such run")]
    send(sender)
    names = [name for name, _ in store.calls]
    assert names == ["open", "resume", "metrics"] * 2 + ["end"]
    assert "sent again" in caplog.text
    assert sender.state is not None
    assert sender.state.run_id == f"id-{tmp_path.name}-2"


def test_another_store_gets_the_whole_run(tmp_path: Path, store: Any) -> None:
    record(tmp_path)
    sender = Sender(tmp_path)
    send(sender)
    sender.close()
    state = State.load(tmp_path)
    assert state is not None
    moved = Sender(tmp_path, Target("http://other", "e", None))
    send(moved)
    assert moved.state is not None
    assert (moved.state.key, moved.state.uri) == (state.key, "http://other")
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics", "end"] * 2


def test_a_journal_shorter_than_what_was_acknowledged_is_sent_again(
    tmp_path: Path, store: Any
) -> None:
    record(tmp_path)
    state = State("http://server", "e", None, "key", run_id="known", applied=50)
    state.save(tmp_path)
    send(Sender(tmp_path))
    assert [name for name, _ in store.calls] == ["resume", "metrics", "end"]
    assert applied(tmp_path) == 6


def test_a_journal_that_lost_its_end_and_grew_again_is_sent_again(
    tmp_path: Path, store: Any
) -> None:
    record(tmp_path)
    sender = Sender(tmp_path)
    send(sender)
    sender.close()
    assert is_closed(tmp_path)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[:-2]))  # a power cut
    assert not is_closed(tmp_path)
    journal = Journal(tmp_path, HEADER)
    for step in (7, 8):
        journal.append("metrics", {"step": step, "values": {"a": 1.0}})
    journal.append("end", {"status": "FINISHED"})
    assert not is_closed(tmp_path)
    store.calls.clear()
    send(Sender(tmp_path))
    assert [name for name, _ in store.calls] == ["resume", "metrics", "end"]
    assert [point.step for point in store.calls[1][1]] == [0, 1, 7, 8]
    assert is_closed(tmp_path)


def test_the_state_of_an_earlier_version_is_gone_on_with(tmp_path: Path, store: Any) -> None:
    record(tmp_path)
    stored = {"uri": "http://server", "experiment": "e", "artifact_root": None, "key": "key",
              "run_id": "known", "parent_run_id": None, "applied": 4}  # fmt: skip
    (tmp_path / STATE).write_text(json.dumps(stored))
    send(Sender(tmp_path))
    assert [name for name, _ in store.calls] == ["metrics", "end"]


def test_two_senders_take_turns(tmp_path: Path, store: Any) -> None:
    record(tmp_path)
    first, second = Sender(tmp_path), Sender(tmp_path)
    first.send_group()
    with pytest.raises(NotReadyError, match="a running process"):
        second.send_group()
    first.close()
    send(second)
    assert store.opened == 1


def test_metrics_without_a_start_still_make_a_run(tmp_path: Path, store: Any) -> None:
    journal = Journal(tmp_path, HEADER)
    journal.append("metrics", {"step": 1, "values": {"a": "nan"}})
    send(Sender(tmp_path))
    assert store.calls[0] == ("open", tmp_path.name)
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics"]


def test_a_child_waits_for_its_parent_and_not_for_a_missing_one(tmp_path: Path, store: Any) -> None:
    record(tmp_path / "parent")
    record(tmp_path / "child", parent="../parent")
    record(tmp_path / "orphan", parent="../nothing")
    child = Sender(tmp_path / "child")
    with pytest.raises(NotReadyError, match="parent"):
        child.send_group()
    send(Sender(tmp_path / "parent"))
    send(child)
    assert child.state is not None
    assert child.state.parent_run_id == "id-parent-1"
    assert ("resume", {"mlflow.parentRunId": "id-parent-1"}) in store.calls
    orphan = Sender(tmp_path / "orphan")
    send(orphan)
    assert orphan.state is not None
    assert orphan.state.parent_run_id is None


def test_an_artifact_that_vanished_is_skipped(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    journal = record(tmp_path, steps=0)
    journal.append("artifact", {"path": str(tmp_path / "gone.png"), "folder": ""})
    journal.append("artifact", {"path": str(tmp_path / JOURNAL), "folder": ""})
    send(Sender(tmp_path))
    assert [value for name, value in store.calls if name == "artifact"] == [str(tmp_path / JOURNAL)]
    assert "gone.png" in caplog.text


def test_metrics_do_not_wait_for_a_broken_artifact_store(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "PAUSES_SECONDS", (0.0, 0.0))
    journal = Journal(tmp_path, HEADER)
    journal.append("start", {"name": "n", "parameters": {}, "tags": {}})
    journal.append("artifact", {"path": str(tmp_path / JOURNAL), "folder": ""})
    journal.append("metrics", {"step": 0, "values": {"loss": 1.0}})
    sender = Sender(tmp_path)
    sender.send_group()
    store.failures, store.alive = [ConnectionError("down")], False
    with pytest.raises(ConnectionError):
        sender.send_group()
    store.failures, store.alive = [PermissionError("no credentials")] * 2, True
    send(sender)
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics"]
    assert "cannot be stored (no credentials)" in caplog.text


def test_a_state_that_cannot_be_written_is_told_once(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path)
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / "in the way").touch()
    send(Sender(tmp_path))
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics", "end"]
    assert len(caplog.records) == 1
