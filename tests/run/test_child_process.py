"""A process of its own: how it ends, its limit, its output; and nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expt.run import process as child_process
from expt.run.process import Ended, run_apart


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Let a shell script take the place of Python."""

    def put(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return tmp_path / "folder/output.log"

    return put


def test_a_real_command_line(tmp_path) -> None:
    log = tmp_path / "output.log"
    ended = run_apart(["no_such_key=1"], log)
    assert ended.exit_code == 2
    assert "no_such_key" in log.read_text()


def test_arguments_output_and_exit_code(command) -> None:
    log = command('echo "$@"; echo trouble >&2; exit 3')
    ended = run_apart(["a=1", "b=[1, 2]"], log)
    assert (ended.exit_code, ended.timed_out) == (3, False)
    assert log.read_text() == "-m expt.run.process a=1 b=[1, 2]\ntrouble\n"
    assert ended.because() == "it ended with exit code 3"


def test_a_kill_is_told_apart(command) -> None:
    ended = run_apart([], command("kill -9 $$"))
    assert ended.exit_code == -signal.SIGKILL
    assert "SIGKILL" in ended.because()
    assert run_apart([], command("kill -11 $$")).because() == "it was ended by SIGSEGV"


def test_a_hang_ends_at_its_limit(command) -> None:
    started = time.monotonic()
    ended = run_apart([], command("exec sleep 30"), time_limit_seconds=0.3)
    assert ended.timed_out
    assert ended.because().startswith("the time limit")
    assert time.monotonic() - started < 5


def test_what_does_not_end_when_asked_is_killed_with_all_it_started(
    command, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(child_process, "SAVE_SECONDS", 0.3)
    pid = tmp_path / "pid"
    log = command(f"trap '' TERM; sleep 30 & echo $! > {pid}; wait; wait")
    ended = run_apart([], log, stopped=lambda: pid.exists() and pid.read_text() != "")
    assert ended.exit_code == -signal.SIGKILL
    assert _gone(int(pid.read_text()))


def test_a_stop_is_passed_on_as_a_request(command) -> None:
    log = command("trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep 0.1; done")
    ended = run_apart([], log, stopped=lambda: log.exists() and "ready" in log.read_text())
    assert (ended.exit_code, ended.timed_out) == (143, False)
    assert log.read_text() == "ready\nsaved\n"


def test_an_exception_leaves_nothing_behind(command, tmp_path) -> None:
    log = command(f"echo $$ > {tmp_path}/pid; exec sleep 30")

    def impatient() -> bool:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_apart([], log, stopped=impatient)
    assert _gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_does_not_outlive_a_killed_parent(tmp_path) -> None:
    pid = tmp_path / "pid"
    child = f"""
import os, time
from expt.run.process import _die_with_parent
_die_with_parent()
open({str(pid)!r}, "w").write(str(os.getpid()))
time.sleep(30)
"""
    script = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True).wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 20
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        number = int(pid.read_text())
        assert not _gone(number, within=0)
    finally:
        parent.kill()
        parent.wait()
    assert _gone(number)


def test_a_signal_without_a_name_is_told_by_number() -> None:
    assert Ended(-(signal.SIGRTMIN + 3), 1.0).because().startswith("it was ended by signal ")


def test_a_normal_end_says_so() -> None:
    assert Ended(1, 2.0).because() == "it ended with exit code 1"


def _gone(pid: int, within: float = 5.0) -> bool:
    """Tell whether a process has ended, also one that nobody has waited for."""
    deadline = time.monotonic() + within
    while True:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
