from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expt.errors import StorageError
from expt.files import remove_empty_date, replace_atomically, write_json, write_text


def text_writer(text: str) -> Any:
    return lambda path: path.write_text(text)


def test_a_file_and_its_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    replace_atomically(path, text_writer("new"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_and_never_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent  # else replacing is not atomic
        assert temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old"

    replace_atomically(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
ZIP_FULL = RuntimeError("[enforce fail at x.cc:858] . PytorchStreamWriter failed writing")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "No space left on device"),
        (OSError("no strerror"), "no strerror"),
        (ZIP_FULL, "PytorchStreamWriter failed writing"),
    ],
)
def test_a_refused_write_leaves_the_old_file(tmp_path: Path, error: Exception, reason: str) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(StorageError) as caught:
        replace_atomically(path, write)
    message = str(caught.value)
    assert message.startswith(f"cannot write {path}: ")
    assert reason in message
    assert "What was saved before is intact" in message and "hydra.run.dir=" in message
    assert caught.value.__cause__ is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusal_while_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        replace_atomically(path, text_writer("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    replace_atomically(path, text_writer("new"), durable=False)  # does not wait
    assert path.read_text() == "new"


def test_a_durable_file_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    synced = []

    def sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        assert path.exists() == is_folder  # the folder, with the new name, comes last
        synced.append(b"folder" if is_folder else os.pread(descriptor, 100, 0))

    monkeypatch.setattr(os, "fsync", sync)
    replace_atomically(path, text_writer("new"))
    assert synced == [b"new", b"folder"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        replace_atomically(tmp_path / "folder" / "file.txt", text_writer("new"))
    assert (tmp_path / "folder").read_text() == "in the way"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug")])
def test_a_bug_of_the_writer_is_not_the_disks_fault(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(type(error), match="a bug"):
        replace_atomically(path, write)
    assert path.read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyboardInterrupt()])
def test_nothing_temporary_is_left_by_any_other_error(tmp_path: Path, error: BaseException) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        replace_atomically(tmp_path / "file.txt", write)
    assert list(tmp_path.iterdir()) == []


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    value = {
        "nan": float("nan"),
        "list": [1.5, float("inf"), {"deep": (float("-inf"), 2)}],
        "numpy": np.float64("nan"),
        "text": "NaN µ",
        "none": None,
        "yes": True,
    }
    write_json(path, value)
    text = path.read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "list": [1.5, None, {"deep": [None, 2]}],
        "numpy": None,
        "text": "NaN µ",
        "none": None,
        "yes": True,
    }
    assert "µ" in text
    assert text.endswith("}\n")


def test_what_json_cannot_say_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_only_an_empty_folder_of_a_day_is_removed(tmp_path: Path) -> None:
    for name in ("2026-11-21", "2026-11-22", "2026-11-21b", "lab"):
        (tmp_path / name).mkdir()
    (tmp_path / "2026-11-22/run").mkdir()
    for folder in list(tmp_path.iterdir()):
        remove_empty_date(folder)
    remove_empty_date(tmp_path / "2026-11-23")
    assert {path.name for path in tmp_path.iterdir()} == {"2026-11-22", "2026-11-21b", "lab"}


def test_several_writers_of_one_path_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    began, go_on = threading.Event(), threading.Event()

    def slowly(temporary: Path) -> None:
        temporary.write_text("slow")
        began.set()
        go_on.wait(10)

    thread = threading.Thread(target=replace_atomically, args=(path, slowly))
    thread.start()
    assert began.wait(10)
    replace_atomically(path, text_writer("fast"))
    assert path.read_text() == "fast"
    go_on.set()
    thread.join()
    assert path.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [path]


def killed_while_it_writes(arguments: list[str]) -> int:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    replace_atomically(Path(arguments[0]), write)
    return 0


def test_what_killed_writers_left_is_removed_at_once_and_no_other_writers_file(
    tmp_path: Path, forked: Any
) -> None:
    path = tmp_path / "last.pt"
    for _ in range(2):
        forked.ended(forked.start(str(path), run=killed_while_it_writes))
    assert len(list(tmp_path.iterdir())) == 1, "the second removed what the first left"
    (killed,) = tmp_path.iterdir()
    place, process, thread = killed.name.split(".")[-2].split("-")
    living = tmp_path / f".last.pt.{place}-{os.getppid()}-{thread}.tmp"
    elsewhere = tmp_path / f".last.pt.{'0' * 12}-{process}-{thread}.tmp"
    for other in (living, elsewhere, tmp_path / ".last.pt.tmp", tmp_path / ".mine.tmp"):
        other.touch()
    replace_atomically(path, text_writer("new"))
    assert set(tmp_path.iterdir()) == {path, living, elsewhere, tmp_path / ".mine.tmp"}


@pytest.mark.parametrize("name", ["n" * 255, "\N{EARTH GLOBE EUROPE-AFRICA}" * 63])
def test_a_name_may_be_as_long_as_the_disk_has_it(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_writer_left_is_removed_when_nobody_can_write_it_any_more(
    tmp_path: Path,
) -> None:
    names = (".old.pt.12-140.tmp", ".new.pt.12-140.tmp", ".mine.tmp", "old.12-140.tmp")
    for name in names:
        (tmp_path / name).touch()
        age = time.time() - (3600 if "new" in name else 30 * 3600)
        os.utime(tmp_path / name, (age, age))
    replace_atomically(tmp_path / "file.txt", text_writer("new"))
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "file.txt"}


def test_names_of_files_in_another_encoding_are_written_as_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"/data/caf\xe9.h5")
    write_text(tmp_path / "file.txt", name)
    assert (tmp_path / "file.txt").read_text() == r"/data/caf\udce9.h5"
    write_json(tmp_path / "file.json", {"path": name})
    assert json.loads((tmp_path / "file.json").read_text()) == {"path": name}
