from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expt.errors import ConfigError
from expt.locks import RUN_LOCK, Lock, run_lock
from expt.result import load_result

HANGING = """
import os
import time
from expt.jobs.traffic.stid import STID


class Net(STID):
    calls = 0

    def forward(self, *args, **others):
        Net.calls += self.training
        if Net.calls == 3 and os.environ.get("HANG"):
            open("hanging", "w").close()
            time.sleep(100)
        return super().forward(*args, **others)
"""
LINE = (
    "memory=minimal", "debug=smoke", "tracking=none", "model=stid", "model._target_=hanging.Net",
    "memory.plan=false", "hydra.run.dir=run",
)  # fmt: skip


def start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "expt", *arguments]
    return subprocess.Popen(command, cwd=home, env={**os.environ, "HANG": "1"})


def test_the_folder_of_a_live_run_is_refused_and_that_of_a_killed_one_is_not(expt, home) -> None:
    (home / "hanging.py").write_text(HANGING)
    process = start(home, *LINE)
    try:
        deadline = time.monotonic() + 60
        while not (home / "hanging").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for line in (LINE, ("trainer.resume=run",), (*LINE, "trainer.resume=true")):
            code, _, err = expt(*line, small=False)
            assert code == 2
            assert f"a run is going on in {home / 'run'} (process {process.pid})" in err
        assert (home / "run/launch.json").exists() and (home / "run/.hydra").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (home / "run" / RUN_LOCK).exists()  # what is left is no lock
    code, _, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert load_result(home / "run").status == "completed"
    assert not (home / "run" / RUN_LOCK).exists()


def test_of_two_starts_at_once_one_runs(home) -> None:
    line = ("memory=minimal", "debug=smoke", "tracking=none", "model=stid", "memory.plan=false")
    command = [sys.executable, "-m", "expt", *line, "hydra.run.dir=run"]
    both = [
        subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert load_result(home / "run").status == "completed"
    refused = max(said, key=len)
    assert "a run is going on in" in refused or "already holds a run" in refused


def test_the_lock_is_for_one_and_leaves_nothing(tmp_path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(ConfigError, match="a run is going on"), run_lock(tmp_path):
            pass
        assert (tmp_path / RUN_LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path):
        pass


def test_a_lock_whose_file_was_removed_is_not_taken_for_the_folders(tmp_path) -> None:
    held = Lock(tmp_path / RUN_LOCK)
    assert held.acquire() and held.is_current
    (tmp_path / RUN_LOCK).unlink()
    assert not held.is_current
    with run_lock(tmp_path):
        assert (tmp_path / RUN_LOCK).exists()
    held.release()
