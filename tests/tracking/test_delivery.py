from __future__ import annotations

import json
import shutil
import time

import pytest

from expt.tracking import journal as journal_module
from expt.tracking.delivery import Deliveries
from expt.tracking.journal import JOURNAL, LOCK, STATE, Lock, Reader, State, read_header
from expt.tracking.mlflow import DeferredTracker, MlflowTracker
from expt.tracking.sender import NotReadyError, Sender, Target
from expt.tracking.store import PARENT_TAG


@pytest.fixture
def deliveries(store):
    thread = Deliveries(Target.of("sqlite:///unused.db", "e", None), lambda uri: store)
    yield thread
    thread.close(0)


def journal(folder, parent=None):
    tracker = DeferredTracker("sqlite:///unused.db", "e", folder, None, parent)
    tracker.start(folder.name, {"a": 1}, {})
    tracker.metrics({"m": 1.0}, 1)
    return tracker


def test_nothing_is_sent_until_it_is_handed_over(store, deliveries, tmp_path):
    tracker = journal(tmp_path / "run")
    assert tracker.finish("FINISHED")
    time.sleep(0.05)
    assert store.calls == []
    deliveries.add(tmp_path / "run")
    assert deliveries.flush(5)
    assert [name for name, _ in store.calls] == ["open", "resume", "metrics", "end"]


def test_what_was_added_since_is_sent_with_the_next_call(store, deliveries, tmp_path):
    tracker = journal(tmp_path / "run")
    deliveries.add(tmp_path / "run")
    assert deliveries.flush(5)
    tracker.tags({"trial.state": "COMPLETE"})
    deliveries.add(tmp_path / "run")
    assert deliveries.flush(5)
    assert store.calls[-1] == ("tags", {"trial.state": "COMPLETE"})
    assert store.opened == 1


def test_a_child_waits_for_its_parent(store, deliveries, tmp_path):
    parent = journal(tmp_path / "parent")
    journal(tmp_path / "child", tmp_path / "parent").close()
    deliveries.add(tmp_path / "child")
    time.sleep(0.05)
    assert store.calls == []
    deliveries.add(tmp_path / "parent")
    assert deliveries.flush(5)
    assert [value for name, value in store.calls if name == "open"] == ["parent", "child"]
    tags = [value for name, value in store.calls if name == "resume"]
    assert tags[1]["mlflow.parentRunId"] == "id-parent-1"
    parent.close()


def test_a_journal_that_somebody_else_sends_is_sent_when_they_are_done(store, deliveries, tmp_path):
    journal(tmp_path / "run").close()
    lock = Lock(tmp_path / "run" / LOCK)
    assert lock.acquire()
    deliveries.add(tmp_path / "run")
    assert not deliveries.flush(0.3)
    assert store.calls == []
    lock.release()
    assert deliveries.flush(5)
    assert store.opened == 1


def test_a_store_that_fails_is_tried_again(store, deliveries, tmp_path):
    store.failures = [OSError("away")]
    journal(tmp_path / "run").close()
    deliveries.add(tmp_path / "run")
    deadline = time.monotonic() + 5
    while store.opened == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.opened == 1


def test_a_store_that_stays_away_holds_nobody_up(store, deliveries, tmp_path, caplog):
    store.failures = [OSError("away")] * 1000
    journal(tmp_path / "run").close()
    deliveries.add(tmp_path / "run")
    started = time.monotonic()
    assert not deliveries.close(20)
    assert time.monotonic() - started < 10
    assert "task=replay" in caplog.text


def test_a_process_of_its_own_goes_on_with_the_same_run(uri, client, tmp_path):
    """The sweeper opens a trial's run, the trial's process fills it, the sweeper closes it."""
    arguments = {"uri": uri, "experiment": "deferred", "artifact_root": tmp_path / "artifacts"}
    first = DeferredTracker(directory=tmp_path / "run", **arguments)
    first.start("search-000", {}, {"trial.number": "0"})
    first.close()
    own = MlflowTracker(directory=tmp_path / "run", **arguments)
    own.start("its own name", {"lr": 0.1}, {"model": "M"})
    own.metrics({"val/mae": 3.0}, 5)
    own.flush()
    own.close()  # killed: it never said how it ended
    last = DeferredTracker(directory=tmp_path / "run", **arguments)
    last.tags({"trial.state": "FAIL"})
    last.finish("FAILED")
    deliveries = Deliveries(last.target)
    deliveries.add(tmp_path / "run")
    assert deliveries.close(20)
    experiment = client.get_experiment_by_name("deferred")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "search-000"
    assert run.info.status == "FAILED"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.metrics == {"val/mae": 3.0}
    assert run.data.tags["trial.state"] == "FAIL"
    assert run.data.tags["model"] == "M"


def test_a_search_that_goes_on_with_another_store_is_whole_and_nested_there(store, tmp_path):
    asked = []
    for uri in ("http://first", "http://second"):
        arguments = {"uri": uri, "experiment": "e", "artifact_root": None}
        parent = DeferredTracker(directory=tmp_path, **arguments)
        parent.start("search", {}, {})
        child = DeferredTracker(
            directory=tmp_path / uri[7:], parent_directory=tmp_path, **arguments
        )
        child.start(uri[7:], {}, {})
        own = Sender(tmp_path / uri[7:], child.target)
        with pytest.raises(NotReadyError):  # the parent has no id in this store yet
            own.send_group()
        own.close()
        deliveries = Deliveries(parent.target, lambda uri: asked.append(uri) or store)
        deliveries.add(tmp_path)
        deliveries.add(tmp_path / uri[7:])
        assert deliveries.close(20)
        assert State.load(tmp_path).uri == uri
    assert asked == ["http://first", "http://second"]
    assert [name for call, name in store.calls if call == "open"] == [
        "search", "first", "search", "second",
    ]  # fmt: skip
    parents = [value.get(PARENT_TAG) for call, value in store.calls if call == "resume"]
    assert parents == [None, "id-search-1", None, None, "id-search-3"]


def test_a_figure_is_recorded_once_whoever_records_it_again(tmp_path):
    first = journal(tmp_path)
    first.metrics({"m": 1.0, "n": 2.0}, 1)
    first.metrics({"m": 1.5}, 1)
    first.finish("FINISHED")
    second = DeferredTracker("sqlite:///unused.db", "e", tmp_path, None)
    second.tags({"a": "b"})
    second.metrics({"n": 2.0, "o": 3.0}, 1)
    recorded = [line.record for line in Reader(tmp_path).read(100)]
    assert [line["values"] for line in recorded if line["kind"] == "metrics"] == [
        {"m": 1.0}, {"n": 2.0}, {"m": 1.5}, {"o": 3.0},
    ]  # fmt: skip


def test_a_copy_that_goes_on_is_a_run_of_its_own_and_a_moved_run_is_not(store, tmp_path):
    arguments = {"uri": "http://server", "experiment": "e", "artifact_root": None}

    def go_on(name, step):
        tracker = DeferredTracker(directory=tmp_path / name, **arguments)
        tracker.start("run", {}, {})
        tracker.metrics({"m": 1.0}, step)
        tracker.close()
        deliveries = Deliveries(tracker.target, lambda uri: store)
        deliveries.add(tmp_path / name)
        assert deliveries.close(20)
        return State.load(tmp_path / name)

    first = go_on("run", 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert go_on("moved", 2).run_id == first.run_id
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert go_on("link", 3).run_id == first.run_id
    store.calls.clear()
    copy = go_on("copy", 3)
    assert (copy.run_id, copy.key != first.key) == ("id-run-2", True)
    points = [point.step for call, points in store.calls if call == "metrics" for point in points]
    assert points == [1, 2, 3]
    assert go_on("copy", 4).run_id == copy.run_id
    assert go_on("moved", 4).run_id == first.run_id
    assert store.opened == 2


def gone_on_with(store, folder, uri, step, **tags):
    """Record and send one figure as the run of a folder; return the run's id in that store."""
    tracker = DeferredTracker(uri, "e", folder, None)
    tracker.start("run", {}, tags)
    tracker.metrics({"m": 1.0}, step)
    tracker.close()
    sender = Sender(folder, tracker.target, store)
    while sender.send_group():
        pass
    sender.close()
    return sender.state.run_id


def test_a_copy_that_goes_on_with_another_store_is_a_run_of_its_own_there(store, tmp_path):
    gone_on_with(store, tmp_path / "run", "http://first", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    store.open_run = lambda experiment, root, key, *rest: key
    keys = [gone_on_with(store, tmp_path / name, "http://second", 2) for name in ("copy", "run")]
    assert keys[0] != keys[1] == read_header(tmp_path / "run")["key"]


def test_the_key_of_a_copy_outlives_what_is_known_of_the_store(store, tmp_path):
    gone_on_with(store, tmp_path / "run", "http://first", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    store.open_run = lambda experiment, root, key, *rest: key
    key = gone_on_with(store, tmp_path / "copy", "http://first", 2)
    assert key != read_header(tmp_path / "run")["key"]
    (tmp_path / "copy" / STATE).write_text("")
    assert gone_on_with(store, tmp_path / "copy", "http://first", 3) == key
    (tmp_path / "copy" / STATE).unlink()
    sender = Sender(tmp_path / "copy", store=store)  # of a replay
    sender.send_group()
    assert sender.state.run_id == key
    sender.close()
    shutil.rmtree(tmp_path / "run")
    assert gone_on_with(store, tmp_path / "copy", "http://first", 4) == key


def as_earlier_versions_left_it(folder, /, **noted):
    """Take the folder out of the journal, and what later versions added out of the state."""
    header, *lines = (folder / JOURNAL).read_text().splitlines(keepends=True)
    kept = {name: value for name, value in json.loads(header).items() if name != "folder"}
    text = json.dumps(kept, separators=(",", ":")) + "\n"
    (folder / JOURNAL).write_text(text + "".join(line for line in lines if '"place"' not in line))
    state = json.loads((folder / STATE).read_text())
    given = {name: state[name] for name in state if name not in ("folder", "digest", "nearby")}
    (folder / STATE).write_text(json.dumps(given | noted))


def test_a_copy_of_a_run_of_an_earlier_version_is_told_from_it(store, tmp_path):
    store.open_run = lambda experiment, root, key, *rest: key
    run, copy = tmp_path / "run", tmp_path / "copy"
    key = gone_on_with(store, run, "http://first", 1, run_dir=str(run))
    as_earlier_versions_left_it(run)
    shutil.copytree(run, copy)
    own = gone_on_with(store, copy, "http://first", 2, run_dir=str(copy))
    assert own != key == gone_on_with(store, run, "http://first", 2, run_dir=str(run))
    as_earlier_versions_left_it(copy, folder=str(copy), key="its own")
    assert gone_on_with(store, copy, "http://second", 3, run_dir=str(copy)) == "its own"
    (copy / STATE).unlink()
    assert gone_on_with(store, copy, "http://second", 4, run_dir=str(copy)) == "its own"


def test_a_journal_is_not_parsed_by_who_only_adds_to_it_however_long_it_is(tmp_path, monkeypatch):
    """Whoever only says how a run ended, or sends what is new, parses no other lines."""
    tracker = journal(tmp_path)
    for step in range(50):
        tracker.metrics({"loss": step}, step)
    tracker.close()
    State("http://server", "e", None, "key", applied=52).save(tmp_path)
    parsed = []
    parse = journal_module._parse
    monkeypatch.setattr(journal_module, "_parse", lambda line: parsed.append(line) or parse(line))
    last = DeferredTracker("sqlite:///unused.db", "e", tmp_path, None)
    last.tags({"trial.state": "COMPLETE"})
    last.metrics({"memory/predicted_peak_bytes": 7.0}, 0)
    last.finish("FINISHED")
    assert Sender(tmp_path).outstanding() == 4
    assert not [line for line in parsed if b"loss" in line]
