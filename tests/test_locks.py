from __future__ import annotations

import json
import time

import pytest

from expt.errors import ConfigError
from expt.locks import RUN_LOCK, Lock, run_lock
from expt.result import load_result
from expt.run.process import PROCESS_NAME

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


def test_the_folder_of_a_live_run_is_refused_and_that_of_a_killed_one_is_not(
    expt, home, forked
) -> None:
    (home / "hanging.py").write_text(HANGING)
    process = forked.start(*LINE, HANG="1")
    try:
        deadline = time.monotonic() + 60
        while not (home / "hanging").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        number = json.loads((process.folder / PROCESS_NAME).read_text())["pid"]
        for line in (LINE, ("trainer.resume=run",), (*LINE, "trainer.resume=true")):
            code, _, err = expt(*line, small=False)
            assert code == 2
            assert f"a run is going on in {home / 'run'} (process {number})" in err
        assert (home / "run/launch.json").exists() and (home / "run/.hydra").exists()
    finally:
        process.kill()
    assert (home / "run" / RUN_LOCK).exists()  # what is left is no lock
    code, _, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert load_result(home / "run").status == "completed"
    assert not (home / "run" / RUN_LOCK).exists()


def test_of_two_starts_at_once_one_runs(home, forked) -> None:
    line = ("memory=minimal", "debug=smoke", "tracking=none", "model=stid", "memory.plan=false")
    both = [forked.start(*line, "hydra.run.dir=run") for _ in range(2)]
    codes, said = zip(*(forked.ended(process) for process in both), strict=True)
    assert sorted(codes) == [0, 2], said
    assert load_result(home / "run").status == "completed"
    refused = said[codes.index(2)]
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
