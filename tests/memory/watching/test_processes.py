from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from expt.errors import ConfigError
from expt.memory.watching import processes as module
from expt.memory.watching.processes import Cards, ProcessTree, find_cards

GIB = 1024**3
PROGRAM = """
import subprocess, sys
held = bytearray(60_000_000)
child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE) if WITH else None
print("ready", flush=True)
sys.stdin.read()
"""
CHILD = "import sys; held = bytearray(50_000_000); print('ready', flush=True); sys.stdin.read()"


def started(with_child: bool) -> Iterator[subprocess.Popen[str]]:
    text = f"CHILD, WITH = {CHILD!r}, {with_child}\n{PROGRAM}"
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(1 + with_child):
            process.stdout.readline()
        yield process


@pytest.fixture
def alone() -> Iterator[subprocess.Popen[str]]:
    yield from started(False)


@pytest.fixture
def family() -> Iterator[subprocess.Popen[str]]:
    yield from started(True)


def resident(*pids: int) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def test_a_process_until_its_end(alone: subprocess.Popen[str]) -> None:
    tree = ProcessTree(alone.pid)
    before = resident(alone.pid)
    reading = tree.look(3.0)
    assert reading is not None
    assert before <= reading.allocated_bytes <= resident(alone.pid), "it may still begin to wait"
    assert before > 60_000_000
    assert reading.step == 3.0
    assert reading.total_bytes == tree.total_bytes >= reading.allocated_bytes
    assert tree.pids == [alone.pid]
    assert "bytearray" in tree.command
    alone.kill()
    os.waitid(os.P_PID, alone.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(alone.pid).status() == psutil.STATUS_ZOMBIE
    assert tree.look(4.0) is None, "nobody has asked yet how it ended"
    alone.wait()
    assert tree.look(5.0) is None


def test_what_it_has_started_counts(
    family: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = ProcessTree(family.pid)
    together = tree.look(0.0)
    assert together is not None
    assert len(tree.pids) == 2
    assert together.allocated_bytes > 110_000_000

    def refused(process: psutil.Process) -> Any:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "memory_full_info", refused)
    apart = ProcessTree(family.pid)
    before = resident(*apart.pids)
    seen = apart.look(1.0)
    assert seen is not None
    assert before <= seen.allocated_bytes <= resident(*apart.pids), "what both map counts twice"
    assert not apart.shared_once


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_what_takes_long_to_read_is_read_seldom(
    family: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    now, read, held = [100.0], [], [40]

    def told(process: psutil.Process) -> Any:
        read.append(process.pid)
        now[0] += seconds
        return SimpleNamespace(pss=25, rss=1)

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(psutil.Process, "memory_full_info", told)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: SimpleNamespace(rss=held[0]))
    tree = ProcessTree(family.pid)
    assert len(read) == 2
    held[0] = 43
    seen = tree.look(1.0)
    assert seen is not None
    if not seconds:
        assert (seen.allocated_bytes, len(read)) == (50, 4), "what is quick is read at every look"
        return
    assert (seen.allocated_bytes, len(read)) == (56, 2), "each has grown by 3"
    now[0] += 48.9
    assert tree.look(2.0) is not None and len(read) == 2
    now[0] += 0.2  # one second is 2 % of fifty
    seen = tree.look(3.0)
    assert seen is not None and (seen.allocated_bytes, len(read)) == (50, 4)
    monkeypatch.setattr(psutil.Process, "children", lambda process, recursive: [])
    seen = tree.look(4.0)
    assert seen is not None and seen.allocated_bytes == 43


def test_its_own_groups_limit_counts(tmp_path: Path, alone: subprocess.Popen[str]) -> None:
    own = tmp_path / str(alone.pid)
    own.mkdir()
    (own / "cgroup").write_text("0::/jobs/7\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/memory.max").write_text("87654321\n")
    tree = ProcessTree(alone.pid, proc=tmp_path, cgroup=tmp_path)
    assert tree.total_bytes == 87654321


@pytest.mark.parametrize("pid", [2**22 + 17, 2**40])
def test_a_process_that_is_gone(pid: int) -> None:
    with pytest.raises(ConfigError, match=f"watch.pid={pid}: there is no such process"):
        ProcessTree(pid, "watch.pid")


def test_a_process_that_may_not_be_read(
    monkeypatch: pytest.MonkeyPatch, alone: subprocess.Popen[str]
) -> None:
    def refused(process: psutil.Process) -> Any:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "memory_info", refused)
    with pytest.raises(ConfigError, match="somebody else's"):
        ProcessTree(alone.pid)


class FakeNvml:
    """Two cards; process 7 is on the second, beside process 8."""

    class NVMLError(Exception):
        pass

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.part: int | None = 3 * GIB

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[Any]:  # noqa: N802
        if card == 0:
            return [SimpleNamespace(pid=8, usedGpuMemory=GIB)]
        rows = [(7, self.part), (8, GIB), (70, GIB)]
        return [SimpleNamespace(pid=pid, usedGpuMemory=count) for pid, count in rows]

    def nvmlDeviceGetMemoryInfo(self, card: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=24 * GIB, used=6 * GIB, free=18 * GIB)


def test_the_cards_that_a_process_is_on() -> None:
    nvml = FakeNvml()
    cards, note = find_cards(nvml)
    assert cards is not None and note == ""
    ((name, reading),) = cards.look(2.0, [7, 70]).items()
    assert name == "gpu:1"
    assert (reading.allocated_bytes, reading.other_bytes) == (4 * GIB, 2 * GIB)
    assert (reading.total_bytes, reading.step) == (24 * GIB, 2.0)
    assert set(cards.look(0.0, [8])) == {"gpu:0", "gpu:1"}
    assert cards.look(0.0, [9]) == {}
    nvml.part = None
    told = cards.look(0.0, [7])["gpu:1"]
    assert (told.allocated_bytes, told.other_bytes) == (0, 6 * GIB), "its part is not told"


def test_without_cards_one_line_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cards(FakeNvml(fails=True)) == (
        None,
        "no figures of cards: NVML does not answer: Driver Not Loaded",
    )
    with pytest.raises(ConfigError):
        Cards(FakeNvml(fails=True))
    assert "no NVIDIA driver" in find_cards(driver=tmp_path / "version")[1]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (tmp_path / "version").touch()
    assert "pip install 'expt[nvml]'" in find_cards(driver=tmp_path / "version")[1]
