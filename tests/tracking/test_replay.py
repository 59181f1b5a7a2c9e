from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expt.tracking import sender as sender_module
from expt.tracking.journal import Journal, State
from expt.tracking.mlflow import DeferredTracker, MlflowTracker
from expt.tracking.replay import Replayed, replay
from expt.tracking.sender import Sender
from expt.uri import PASSWORD

HEADER = {"uri": "http://server", "experiment": "e", "artifact_root": None, "parent": None}


def record(directory: Path, **header: Any) -> None:
    journal = Journal(directory, HEADER | header)
    journal.append("start", {"name": directory.name, "parameters": {}, "tags": {}})
    journal.append("metrics", {"step": 0, "values": {"loss": 1.0}})


def test_everything_is_sent_parents_first_and_once(tmp_path: Path, store: Any) -> None:
    record(tmp_path / "a", parent="../z")
    record(tmp_path / "z" / "deep", parent="..")
    record(tmp_path / "z")
    report = replay(tmp_path)
    assert [name for call, name in store.calls if call == "open"] == ["z", "a", "deep"]
    assert report.complete
    assert report.directories == tuple(
        Replayed(tmp_path / name, sent=2, left=0) for name in ("z", "a", "z/deep")
    )
    assert replay(tmp_path).directories == ()


def test_only_what_is_missing_is_sent(tmp_path: Path, store: Any) -> None:
    record(tmp_path)
    sender = Sender(tmp_path)
    sender.send_group()
    sender.close()
    assert replay(tmp_path).directories == (Replayed(tmp_path, sent=1, left=0),)
    assert store.opened == 1


def test_a_directory_in_use_is_left_alone(tmp_path: Path, store: Any) -> None:
    record(tmp_path / "live")
    sender = Sender(tmp_path / "live")
    sender.open()
    report = replay(tmp_path)
    assert store.calls == []
    assert report.complete
    assert "a running process" in (report.directories[0].reason or "")


def test_a_silent_store_is_asked_once_and_others_are_served(tmp_path: Path, store: Any) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b")
    record(tmp_path / "c", uri="http://user:secret@other")
    store.failures = [ConnectionError("refused")]
    report = replay(tmp_path)
    assert [(entry.sent, entry.left) for entry in report.directories] == [(0, 2), (0, 2), (2, 0)]
    assert not report.complete
    assert report.directories[1].reason == "http://server does not answer (refused)"
    store.failures = []
    assert replay(tmp_path).complete


def test_one_run_that_a_store_cannot_take_does_not_stop_the_others(
    tmp_path: Path, store: Any
) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b")
    store.failures = [ValueError("no such letter")]
    report = replay(tmp_path)
    assert [(entry.sent, entry.left) for entry in report.directories] == [(0, 2), (2, 0)]
    assert report.directories[0].reason == "http://server does not take it (no such letter)"


def test_the_state_says_where_to(tmp_path: Path, store: Any, monkeypatch: Any) -> None:
    record(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(sender_module, "MlflowStore", lambda uri: asked.append(uri) or store)
    State("http://new", "e", None, "key").save(tmp_path)
    replay(tmp_path)
    assert asked == ["http://new"]


@pytest.mark.parametrize("content", ["", "{}\n", "not json\n"])
def test_a_broken_journal_is_passed_over(tmp_path: Path, store: Any, content: str) -> None:
    (tmp_path / "tracking.jsonl").write_text(content)
    assert replay(tmp_path).directories == ()


def test_a_password_is_sent_and_never_written(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sender_module, "MlflowStore", lambda uri: asked.append(uri) or store)
    monkeypatch.delenv(PASSWORD, raising=False)
    store.failures = [ConnectionError("refused")] * 100
    tracker = MlflowTracker("http://me:word@host", "e", tmp_path, None, flush_seconds=5)
    tracker.start("n", {}, {})
    tracker.finish("FINISHED")
    assert set(asked) == {"http://me:word@host"}
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "http://me:***@host" in written
    assert "word@" not in written
    store.failures = []
    entry = replay(tmp_path).directories[0]
    assert entry.left == 2
    assert PASSWORD in str(entry.reason)
    monkeypatch.setenv(PASSWORD, "word")
    assert replay(tmp_path).complete
    assert asked[-1] == "http://me:word@host"
    assert store.opened == 1


def test_artifacts_move_with_their_run_and_one_that_is_gone_is_left(
    tmp_path: Path, store: Any
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    outside = tmp_path / "outside.txt"
    outside.write_text("a")
    (before / "plots").mkdir(parents=True)
    (before / "plots/a.png").write_text("a")
    tracker = DeferredTracker("http://server", "e", before, None)
    tracker.start("run", {}, {})
    for path in (before / "plots/a.png", outside, before / "gone.png"):
        tracker.artifact(path, "plots")
    tracker.close()
    before.rename(after)
    (entry,) = replay(after).directories
    sent = [value for call, value in store.calls if call == "artifact"]
    assert sent == [str(after / "plots/a.png"), str(outside)]
    assert (entry.sent, entry.left) == (3, 1)
    assert entry.reason == f"gone or not to be stored: {after / 'gone.png'}"


@pytest.mark.parametrize("begun", [True, False])
def test_a_moved_tree_is_replayed_into_the_database_that_moved_with_it(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sender_module, "MlflowStore", lambda uri: asked.append(uri) or store)
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "a").mkdir(parents=True)
    (old / "mlflow.db").touch()
    for folder in (old, old / "a"):
        parent = None if folder == old else old
        uri = f"sqlite:///{old}/mlflow.db?timeout=5"
        tracker = DeferredTracker(uri, "e", folder, old / "artifacts", parent)
        tracker.start(folder.name, {}, {})
        if begun:
            sender = Sender(folder)
            sender.send_group()
            sender.close()
        tracker.finish("FINISHED")
    old.rename(new)
    asked.clear()
    assert replay(new).complete
    assert set(asked) == {f"sqlite:///{new}/mlflow.db?timeout=5"}
    state = State.load(new / "a")
    assert state is not None and state.parent_run_id == "id-old-1"
    assert state.artifact_root == (new / "artifacts").as_uri()
    assert store.opened == 2
    assert [value for name, value in store.calls if name == "end"] == ["FINISHED"] * 2
    new.rename(tmp_path / "newer")  # and once more
    DeferredTracker(uri, "e", tmp_path / "newer/a", None).finish("FAILED")
    assert replay(tmp_path / "newer").complete
    assert asked[-1] == f"sqlite:///{tmp_path}/newer/mlflow.db?timeout=5"


def test_a_database_that_a_run_was_sent_to_is_not_made_anew(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/gone/mlflow.db"
    for name in ("never sent", "sent", "sent in part"):
        DeferredTracker(uri, "e", tmp_path / name, None).start("a", {}, {})
    State(uri, "e", None, "key", run_id="known", applied=2).save(tmp_path / "sent")
    State(uri, "e", None, "key", run_id="known").save(tmp_path / "sent in part")
    entries = replay(tmp_path).directories
    assert [(entry.directory.name, entry.sent, entry.left) for entry in entries] == [
        ("never sent", 0, 1), ("sent in part", 0, 1)
    ]  # fmt: skip
    for entry in entries:
        assert f"there is no file {tmp_path}/gone/mlflow.db; put it back" in str(entry.reason)
    assert not (tmp_path / "gone").exists()
