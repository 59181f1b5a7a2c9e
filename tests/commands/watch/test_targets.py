from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from expt.commands.watch.targets import RunTarget
from expt.errors import ConfigError
from expt.files import write_json
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.alarms import MOST_ALARMS
from expt.memory.watching.history import to_csv
from expt.result import RunResult, save_launch

BUDGET = {"step": 4, "allocated_bytes": 700, "peak_bytes": 900, "total_bytes": 1000}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that this very process is."""
    (tmp_path / "run.lock").write_text(f"{os.getpid()}\n")
    dated(tmp_path / "run.lock", LATER)
    return tmp_path


YEAR_2001 = 1e9
LATER = 4e9
"""A file's date after the start of this process, whatever its clock and the file system's say."""


def dated(path: Path, at: float) -> None:
    os.utime(path, (at, at))


def tell(run: Path, step: int, at: float | None = None, **more: Any) -> None:
    path = run / "checkpoints/progress.json"
    write_json(path, {"step": step, "epoch": 0, "val/mae": None, **more})
    dated(path, LATER if at is None else at)


def test_a_run_tells_of_itself(run: Path) -> None:
    target = RunTarget(run, None)
    first = target.look(0.0)
    assert first is not None
    assert set(first.readings) == {"host"}
    assert (first.step, first.total_steps) == (None, None)
    memory = {"budget": BUDGET, "host": {"step": 4, "allocated_bytes": 1, "total_bytes": 2}}
    facts = {"total_steps": 50, "predicted_peak_bytes": 950}
    tell(run, 5, memory=memory, **facts)
    second = target.look(2.5)
    assert second is not None
    assert second.readings["budget"] == Reading(2.5, 700, None, None, 900, 1000)
    assert second.readings["host"].allocated_bytes > 1_000_000, "with all it started, from outside"
    assert (second.step, second.total_steps, second.epoch) == (5, 50, 0)
    assert second.predicted == {"budget": 950}
    third = target.look(3.0)
    assert third is not None
    assert set(third.readings) == {"host"}, "what is told once is one reading"
    assert third.step == 5


def test_the_allocator_knows_more_than_nvml(run: Path) -> None:
    class Cards:
        def look(self, step: float, pids: Any) -> dict[str, Reading]:
            return {"gpu:0": Reading(step, 5, None, 6, None, 100)}

    target = RunTarget(run, Cards())  # type: ignore[arg-type]
    first = target.look(0.0)
    assert first is not None and set(first.readings) == {"gpu:0", "host"}
    tell(run, 1, memory={"cuda:0": {"allocated_bytes": 7, "reserved_bytes": 9, "total_bytes": 99}})
    second = target.look(1.0)
    assert second is not None and set(second.readings) == {"cuda:0", "host"}
    assert second.readings["cuda:0"] == Reading(1.0, 7, 9, None, None, 99)


def test_what_an_earlier_part_left_is_not_taken_for_news(run: Path) -> None:
    tell(run, 40, at=YEAR_2001, memory={"budget": BUDGET})
    write_json(run / "alarms.json", [{"step": 1}])
    target = RunTarget(run, None)
    first = target.look(0.0)
    assert first is not None
    assert first.step is None and first.alarms == () and "budget" not in first.readings
    write_json(run / "alarms.json", [{"step": 1}, {"step": 2}])
    second = target.look(1.0)
    assert second is not None and second.alarms == ({"step": 2},)


def test_a_damaged_file_is_no_news(run: Path) -> None:
    target = RunTarget(run, None)
    (run / "checkpoints").mkdir()
    for text in ("", "[]", '{"epoch": 1}', '{"step": 3, "epoch"'):
        (run / "checkpoints/progress.json").write_text(text)
        seen = target.look(0.0)
        assert seen is not None and seen.step is None


def test_how_a_run_ended(run: Path) -> None:
    target = RunTarget(run, None)
    assert "killed" in target.ending()
    result = RunResult("completed", "epochs", steps=8)
    result.memory["peak_allocated_bytes"] = 3 * 1024**2
    result.save(run)
    dated(run / "result.json", LATER)
    assert target.ending() == "the run has ended: completed (epochs) after 8 steps, peak 3.0 MiB"


def test_a_result_of_the_part_before_a_resume_is_not_believed(run: Path) -> None:
    RunResult("stopped", "signal", steps=3).save(run)
    dated(run / "result.json", LATER - 50)
    target = RunTarget(run, None)
    assert "it was killed" in target.ending()
    (run / "run.lock").write_text("4194321\n")
    dated(run / "run.lock", LATER)
    assert "the run was killed" in refusal(run) and "trainer.resume=" in refusal(run)
    dated(run / "result.json", LATER + 50)
    assert "stopped (signal)" in target.ending() and "stopped (signal)" in refusal(run)


def test_alarms_are_told_also_after_the_file_is_full(run: Path) -> None:
    rows = [{"step": step, "rung_at": float(step)} for step in range(MOST_ALARMS)]
    write_json(run / "alarms.json", rows)
    target = RunTarget(run, None)
    for newest in (MOST_ALARMS, MOST_ALARMS + 1):
        rows = [*rows[1:], {"step": 7, "rung_at": float(newest)}]
        write_json(run / "alarms.json", rows)
        seen = target.look(0.0)
        assert seen is not None and seen.alarms == (rows[-1],)
        seen = target.look(1.0)
        assert seen is not None and seen.alarms == ()


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        RunTarget(folder, None)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"watch.run={folder}: ")
    return message


def test_what_is_no_run_that_goes_on_is_said_in_a_line(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    assert "no run in this folder" in refusal(tmp_path)
    save_launch(tmp_path, {"overrides": [], "cwd": ".", "config_dir": None})
    assert f"trainer.resume={tmp_path} goes on" in refusal(tmp_path)
    (tmp_path / "run.lock").write_text("4194321\n")
    assert "killed: its process 4194321 is gone" in refusal(tmp_path)
    RunResult("stopped", "signal", steps=3).save(tmp_path)
    dated(tmp_path / "run.lock", YEAR_2001)
    dated(tmp_path / "result.json", YEAR_2001 + 100)
    message = refusal(tmp_path)
    assert "the run ended 2001-09-" in message
    assert "stopped (signal) after 3 steps; it recorded no readings" in message
    (tmp_path / "memory.csv").write_text(
        to_csv({"host": [Reading(1, 3 * 2**20), Reading(2, 5 * 2**20)]})
    )
    assert "host 3.0 MiB to 5.0 MiB in 2 readings" in refusal(tmp_path)


def test_a_number_that_another_process_has_now_is_not_the_run(run: Path) -> None:
    dated(run / "run.lock", YEAR_2001)  # before this process was started
    assert "killed" in refusal(run)
    assert json.loads((run / "run.lock").read_text()) == os.getpid()
