"""The benchmark of a GPU: every section runs, it goes on, and its tables invent nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs import each other from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.timeout(600)
def test_every_section_runs_without_a_gpu() -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--smoke"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert ran.returncode == 0, ran.stderr[-2000:]
    from gpu_sections import SECTIONS

    for section in SECTIONS:
        assert f"{section}: " in ran.stdout, section
    assert "error" not in ran.stdout
    stored = FOLDER.parent / "outputs" / "benchmarks" / "gpu-smoke.json"
    record = json.loads(stored.read_text("utf-8"))
    assert all(record[section] for section in SECTIONS)
    assert record["recovery"]["full"]["events"], "the budget was too small on purpose"
    assert record["recovery"]["full"]["weights_distance"] < 1e-3
    assert record["accuracy"]["lite, metr_la_week, seed 0"]["done"]


def test_tables_of_nothing_say_that_nothing_was_measured() -> None:
    from gpu_tables import PRESETS, details, tables

    text = tables({})
    for preset in PRESETS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {preset}, bf16")]
        assert line.count("not measured") == 8
    assert text.rstrip().endswith("`python benchmarks/gpu.py --minutes 20`.")
    assert details({}).count("not measured") == 5


def test_tables_hold_the_figures_and_name_what_is_absent() -> None:
    from gpu_tables import accuracy_rows, check_rows, loop_row, step_row

    record: dict[str, Any] = {
        "steps": {
            "lite, bf16, off": {"seconds_per_step": 0.008},
            "lite, bf16, graph": {
                "seconds_per_step": 0.002, "windows_per_second": 8000.0,
                "peak_allocated_bytes": 500 * 2**20, "peak_reserved_bytes": 900 * 2**20,
            },
        },
        "floors": {"lite, bf16": {"floor_seconds": 0.001}},
        "loops": {
            "lite": {
                "ours": {"windows_per_second": 8000.0},
                "bare loop": {"windows_per_second": 2000.0, "ours_over_it": 0.25},
            }
        },
    }  # fmt: skip
    assert step_row(record, "lite") == (
        "lite, bf16", "8.00", "2.00", "not measured", "8000", "1.00", "x2.0", "500", "900",
    )  # fmt: skip
    assert loop_row(record, "lite") == (
        "lite", "8000", "2000", "not installed", "x4.0", "not measured",
    )  # fmt: skip
    record["steps"]["lite, bf16, graph"]["captured"] = False  # it fell back to eager steps
    assert step_row(record, "lite")[2:] == ("not measured",) * 3 + ("1.00", *("not measured",) * 3)
    equal = {"weights_distance": 0.0, "steps": 200, "captured": False}
    assert "nothing was captured" in check_rows({"correctness": {"graph, fp32": equal}})[0][1]
    unfinished = {"model": "lite", "data": "metr_la_29", "done": False}
    assert "not measured" in accuracy_rows({"accuracy": {"a": unfinished}})[0]


def test_what_is_stored_is_not_measured_again_but_errors_and_unfinished_trainings_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gpu

    stored: dict[str, Any] = {
        "steps": {"a": {"seconds_per_step": 1.0}, "b": {"error": "no"}, "c": {"done": False}}
    }
    asked: list[list[str]] = []
    items = dict.fromkeys("abcd", dict)
    monkeypatch.setattr(gpu, "SECTIONS", {"steps": lambda plan: items})
    monkeypatch.setattr(gpu, "load", lambda name: stored)
    monkeypatch.setattr(gpu, "check", lambda plan: None)
    monkeypatch.setattr(gpu, "measure", lambda p, name, wanted, record: asked.append(wanted))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--sections", "steps"])
    gpu.main()
    assert asked == [["b", "c", "d"]]


def test_an_item_that_ends_its_process_costs_that_item_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu

    program = (
        "import json, sys\n"
        "for item in sys.argv[sys.argv.index('--items') + 1:]:\n"
        "    if item == 'fatal': sys.exit(9)\n"
        "    print(json.dumps({'item': item, 'row': {'figure': 1}}), flush=True)\n"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(program, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(worker))
    monkeypatch.setattr(gpu, "keep", lambda plan, record: None)
    monkeypatch.setattr(gpu, "draw", lambda record, folder: None)
    record: dict[str, Any] = {"steps": {}}
    plan = gpu.Plan("cuda", False, time.time() + 60)
    gpu.measure(plan, "steps", ["one", "fatal", "two"], record)
    assert record["steps"]["one"]["figure"] == record["steps"]["two"]["figure"] == 1
    assert record["steps"]["fatal"]["error"] == "the process ended with 9"


def test_the_loops_are_those_of_207_sensors_with_lightning_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import loop_times
    import rival_loops
    from gpu_steps import rivals

    asked: list[tuple[Any, ...]] = []

    def measure(*given: Any) -> dict[str, Any]:
        asked.append(given)
        return {"ours": {"seconds_per_step": 0.5}}

    monkeypatch.setattr(loop_times, "measure", measure)
    monkeypatch.setattr(rival_loops, "LIGHTNING", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    row = rivals("minimal", "cpu", 1, 2, "data.batch_size=3")
    assert row["ours"]["windows_per_second"] == 6.0
    (tmp_path / "pytorch_lightning").mkdir()
    rivals("minimal", "cpu", 1, 2, "data.batch_size=3")
    for found, (*_, lightning, data, batch) in zip((None, tmp_path), asked, strict=True):
        assert (lightning, data, batch) == (found, "data=metr_la_week", "data.batch_size=3")


def test_figures_of_a_cpu_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setattr(gpu, "store", lambda *given: pytest.fail("stored"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--minutes", "0.001"])
    with pytest.raises(SystemExit, match="--smoke"):
        gpu.main()


def test_plots_are_left_out_where_there_is_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setattr(gpu, "version", lambda name: None)
    monkeypatch.setattr(gpu, "keep", lambda plan, record: None)
    monkeypatch.setattr(gpu, "draw", lambda record, folder: pytest.fail("drew"))
    monkeypatch.setattr(gpu, "rows", lambda plan, section, wanted: [(name, {}) for name in "a"])
    gpu.measure(gpu.Plan("cpu", True, time.time() + 60), "steps", ["a"], {"steps": {}})


def test_a_training_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu_trials

    started: list[subprocess.Popen[bytes]] = []
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    popen = subprocess.Popen

    def stubborn(command: list[str], **given: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", deaf], **given))
        return started[0]

    monkeypatch.setattr(gpu_trials, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_trials, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(gpu_trials.subprocess, "Popen", stubborn)
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_trials.accuracy("lite", "metr_la_29", 0, "cpu", 1.0)
    assert started[0].wait(timeout=10) == -9


def test_nothing_is_begun_when_the_minutes_are_up() -> None:
    import gpu

    assert list(gpu.rows(gpu.Plan("cpu", False, time.time() - 1), "steps", ["x"])) == []
