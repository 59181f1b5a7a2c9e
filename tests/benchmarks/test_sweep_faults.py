"""The fault run, small: one kill of the search, one of a trial, and every fault of the model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    source = str(FOLDER.parent / "src")
    monkeypatch.setenv("PYTHONPATH", f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.timeout(600)
def test_every_trial_is_there_once_whatever_happened(tmp_path: Path) -> None:
    from sweep_faults import FaultRun, violations

    run = FaultRun(tmp_path, n_trials=7, sweeper_kills=(2,), trial_kills=(5,), limit_seconds=20.0)
    found = run.run()
    log = (tmp_path / "output.log").read_text()
    assert violations(found) == [], log
    assert found["sweeper_starts"] == 2, log
    assert found["adopted_or_retried"] >= 1
    assert {"out_of_memory", "diverged", "killed", "timeout"} <= set(found["kinds"]), log
    assert "Traceback" not in log


def test_a_difference_would_be_found() -> None:
    from sweep_faults import violations

    sound = {
        "exit_code": 0, "trials": 2, "finished": 2, "started": 2, "trained_twice": 0,
        "not_finished_in_study": 0, "numbers_missing": 0, "kinds": {"completed": 2},
        "processes_that_outlived_the_sweeper": 0, "processes_left": 0, "best_is_feasible": True,
        "best_is_tested": True, "best_is_smallest": True, "runs_of_trials": 2, "runs_doubled": 0,
        "differences": [], "parents": 1, "runs_left_running": 0,
    }  # fmt: skip
    assert violations(sound) == []
    assert violations({**sound, "finished": 3}) == ["finished is 3, not 2"]
    assert violations({**sound, "runs_left_running": 1}) == ["runs_left_running is 1, not 0"]
