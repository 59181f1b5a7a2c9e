from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expt.errors import StorageError
from expt.tracking.journal import JOURNAL, STATE, Journal, Lock, Reader, State, read_header

HEADER = {"uri": "sqlite:///x.db", "experiment": "e", "artifact_root": None, "parent": None}


def kinds(directory: Path) -> list[str | None]:
    return [line.record and line.record["kind"] for line in Reader(directory).read(100)]


def test_records_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "folder", HEADER)
    journal.append("tags", {"values": {"a": "é"}})
    journal.append("end", {"status": "FINISHED"})
    lines = Reader(tmp_path / "new" / "folder").read(100)
    records = [line.record or {} for line in lines]
    assert [record["kind"] for record in records] == ["journal", "tags", "end"]
    assert records[1]["values"] == {"a": "é"}
    assert records[0]["time"] <= records[1]["time"] <= records[2]["time"]
    assert lines[-1].end == journal.end == (tmp_path / "new" / "folder" / JOURNAL).stat().st_size


def test_going_on_keeps_the_first_header(tmp_path: Path) -> None:
    first = Journal(tmp_path, HEADER)
    first.append("start", {})
    header = read_header(tmp_path)
    second = Journal(tmp_path, HEADER | {"uri": "http://elsewhere"})
    second.append("start", {})
    assert not first.resumed
    assert second.resumed
    assert header is not None
    assert read_header(tmp_path) == header
    assert kinds(tmp_path) == ["journal", "start", "start"]


def test_a_torn_line_is_left_and_then_ended(tmp_path: Path) -> None:
    Journal(tmp_path, HEADER).append("start", {})
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"kind":"metrics","ste')
    assert kinds(tmp_path) == ["journal", "start"]
    Journal(tmp_path, HEADER).append("end", {})
    assert kinds(tmp_path) == ["journal", "start", None, "end"]


def test_a_journal_without_a_whole_first_line_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"kind":"jour')
    journal = Journal(tmp_path, HEADER)
    journal.append("start", {})
    assert not journal.resumed
    assert kinds(tmp_path) == ["journal", "start"]
    assert (tmp_path / f"{JOURNAL}.unreadable").read_bytes() == b'{"kind":"jour'


def test_a_line_cut_short_by_a_full_disk_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, HEADER)
    journal.append("start", {})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(OSError) as caught:
        journal.append("metrics", {"step": 1})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    journal.append("end", {})
    assert kinds(tmp_path) == ["journal", "start", None, "end"]
    assert journal.end == (tmp_path / JOURNAL).stat().st_size


def test_a_first_line_cut_short_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, HEADER)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(OSError):
        journal.append("start", {})
    monkeypatch.undo()
    journal.append("start", {})
    assert kinds(tmp_path) == ["journal", "start"]


def test_the_reader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = Journal(tmp_path, HEADER)
    for step in range(5):
        journal.append("metrics", {"step": step})
    reader = Reader(tmp_path)
    assert reader.skip(2) == 2
    assert [line.record and line.record["step"] for line in reader.read(2)] == [1, 2]
    journal.append("end", {})
    assert len(reader.read(100)) == 3
    assert reader.read(100) == []
    assert Reader(tmp_path).skip(100) == 7


def test_state_comes_back_and_half_a_state_is_none(tmp_path: Path) -> None:
    assert State.load(tmp_path) is None
    state = State("u", "e", None, "k", run_id="r", parent_run_id="p", applied=7)
    state.save(tmp_path)
    assert State.load(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    for broken in ('{"uri": "u"', '{"uri": "u"}', "[]"):
        (tmp_path / STATE).write_text(broken)
        assert State.load(tmp_path) is None


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = Lock(path)
    assert lock.acquire()
    assert not Lock(path).acquire()
    lock.release()
    program = (
        "import sys; from pathlib import Path; from expt.tracking.journal import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not Lock(path).acquire()
        holder.kill()
    assert Lock(path).acquire()


def test_a_lock_that_is_required_is_refused_where_there_are_none(tmp_path, monkeypatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Lock(tmp_path / "lock").acquire()
    with pytest.raises(StorageError, match=r"without locks.*hydra\.sweep\.dir"):
        Lock(tmp_path / "lock").acquire(wait=True, required=True)
