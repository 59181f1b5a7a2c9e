"""The benchmark of a GPU: every section runs, it goes on, and its tables invent nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

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
    (record,) = json.loads(stored.read_text("utf-8"))["groups"].values()
    assert all(record[section] for section in SECTIONS)
    assert record["steps"]["full, bf16, off"]["card"]["name"] == "cpu"
    assert record["steps"]["full, bf16, off"]["measured_in"] == "a process of its own"
    assert record["recovery"]["full"]["events"], "the budget was too small on purpose"
    assert record["recovery"]["full"]["weights_distance"] < 1e-3
    assert record["accuracy"]["lite, metr_la_week, seed 0"]["done"]


def test_without_a_measurement_there_are_no_tables() -> None:
    from gpu_tables import details, tables

    assert tables({}).splitlines() == [
        "Not measured: it takes a CUDA device and `python benchmarks/gpu.py --minutes 20`."
    ]
    assert details({}) == ""


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
    record["steps"]["lite, bf16, compile"] = {
        "seconds_per_step": 0.001, "captured": True, "said": ["the model is not compiled: no"],
    }  # fmt: skip
    assert step_row(record, "lite")[3] == "not measured"
    equal: dict[str, Any] = {"weights_distance": 0.0, "steps": 200, "captured": False}
    assert "nothing was captured" in check_rows({"correctness": {"graph, fp32": equal}})[0][1]
    equal |= {"captured": True, "said": ["the model is not compiled: no"]}
    assert "not as asked for" in check_rows({"correctness": {"compile, fp32": equal}})[0][1]
    equal["said"] = []
    assert check_rows({"correctness": {"compile, fp32": equal}})[0][1] == "0.0e+00"
    unfinished = {"model": "lite", "data": "metr_la_29", "done": False}
    assert "not measured" in accuracy_rows({"accuracy": {"a": unfinished}})[0]


CARD = {"name": "A card", "total_bytes": 2**34, "driver": "1", "cuda": "13.0", "torch": "2.11.0"}


def group(record: dict[str, Any] | None = None, sections: Any = None, **other: Any) -> Any:
    """A group of a result file, which holds `sections` already."""
    from gpu_record import Group

    found = Group({} if record is None else record, CARD | other)
    found.sections |= sections or {}
    return found


def test_what_is_stored_is_not_measured_again_but_errors_and_unfinished_trainings_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gpu

    stored: dict[str, Any] = {}
    group(
        stored,
        {"steps": {"a": {"seconds_per_step": 1.0}, "b": {"error": "no"}, "c": {"done": False}}},
    )
    asked: list[list[str]] = []
    items = dict.fromkeys("abcd", dict)
    monkeypatch.setattr(gpu, "SECTIONS", {"steps": lambda plan: items})
    monkeypatch.setattr(gpu, "load", lambda name: stored)
    monkeypatch.setattr(gpu, "check", lambda plan: None)
    monkeypatch.setattr(gpu, "looked_up", lambda device: CARD)
    monkeypatch.setattr(gpu.signal, "signal", lambda *given: None)
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
    for section in ("steps", "floors"):  # in a process each, and in one
        record = group()
        plan = gpu.Plan("cuda", False, time.time() + 60)
        gpu.measure(plan, section, ["one", "fatal", "two"], record)
        found = record.sections[section]
        assert found["one"]["figure"] == found["two"]["figure"] == 1
        assert found["fatal"]["error"] == "the process ended with 9"


def test_what_comes_after_an_error_is_measured_in_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of CUDA stays in its process, where tidying up would fail too."""
    import gpu

    def fails() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    processes: list[list[str]] = []

    def answers(plan: Any, section: str, wanted: list[str]) -> Any:
        processes.append(list(wanted))
        return gpu.rows(plan, section, wanted)

    items = {"one": dict, "bad": fails, "two": dict}
    tidied: list[str] = []
    monkeypatch.setattr(gpu, "SECTIONS", {"floors": lambda plan: items})
    monkeypatch.setattr(gpu, "answers", answers)
    monkeypatch.setattr(gpu, "tidy", tidied.append)
    monkeypatch.setattr(gpu, "keep", lambda plan, record: None)
    monkeypatch.setattr(gpu, "draw", lambda record, folder: None)
    record = group()
    gpu.measure(gpu.Plan("cuda", False, time.time() + 60), "floors", list(items), record)
    assert processes == [["one", "bad", "two"], ["two"]]
    assert "illegal memory access" in record.sections["floors"]["bad"]["error"]
    assert "error" not in record.sections["floors"]["two"]
    assert len(tidied) == 2


def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, items: list[str]
) -> dict[str, Any]:
    """Return the rows of items that a worker of this program answers for."""
    import gpu

    worker = tmp_path / "worker.py"
    worker.write_text(program, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(worker))
    monkeypatch.setattr(gpu, "keep", lambda plan, record: None)
    monkeypatch.setattr(gpu, "draw", lambda record, folder: None)
    record = group()
    gpu.measure(gpu.Plan("cuda", False, time.time() + 60), "floors", list(items), record)
    rows: dict[str, Any] = record.sections["floors"]
    assert list(rows) == items
    return rows


def test_a_process_that_ends_badly_after_its_last_item_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import json, sys\n"
        "for item in sys.argv[sys.argv.index('--items') + 1:]:\n"
        "    print(json.dumps({'item': item, 'row': {'figure': 1}}), flush=True)\n"
        "sys.exit(9)\n"
    )
    rows = measured(monkeypatch, tmp_path, program, ["one", "two"])
    assert {row["figure"] for row in rows.values()} == {1}
    assert "ended with 9 after its last item" in capsys.readouterr().out


def test_the_item_after_an_error_is_not_blamed_for_how_the_process_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = (
        "import json, sys\n"
        "item = sys.argv[sys.argv.index('--items') + 1]\n"
        "row = {'error': 'illegal memory access'} if item == 'bad' else {'figure': 1}\n"
        "print(json.dumps({'item': item, 'row': row}), flush=True)\n"
        "sys.exit(9 if item == 'bad' else 0)\n"
    )
    rows = measured(monkeypatch, tmp_path, program, ["bad", "two"])
    assert rows["bad"]["error"] == "illegal memory access"
    assert rows["two"]["figure"] == 1


def test_a_process_that_ends_well_without_a_row_is_an_error_and_not_asked_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = measured(monkeypatch, tmp_path, "print('no row')\n", ["a", "b"])
    assert {row["error"] for row in rows.values()} == {"the process ended well, but with no row"}


def endless(tmp_path: Path) -> Path:
    """A worker that answers once and then, with a process it started, never again."""
    worker = tmp_path / "worker.py"
    program = (
        "import json, subprocess, sys, time\n"
        "items = sys.argv[sys.argv.index('--items') + 1:]\n"
        "print(json.dumps({'item': items[0], 'row': {'figure': 1}}), flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    worker.write_text(program, encoding="utf-8")
    return worker


@pytest.mark.parametrize(
    ("minutes_left", "most", "error"), [(1, 3.0, "it took more than 3 s"), (0.06, 60.0, None)]
)
def test_an_item_is_ended_in_time_and_what_came_before_it_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    minutes_left: float,
    most: float,
    error: str | None,
) -> None:
    import gpu

    monkeypatch.setattr(gpu, "__file__", str(endless(tmp_path)))
    monkeypatch.setattr(gpu, "ITEM_SECONDS", most)
    kept: list[Any] = []
    monkeypatch.setattr(gpu, "keep", lambda plan, record: kept.append(dict(record.sections)))
    monkeypatch.setattr(gpu, "draw", lambda record, folder: None)
    record, started = group(), time.monotonic()
    plan = gpu.Plan("cuda", False, time.time() + 60 * minutes_left)
    gpu.measure(plan, "floors", ["one", "hangs"], record)
    assert time.monotonic() - started < 15
    assert kept[0]["floors"]["one"]["figure"] == 1
    assert record.sections["floors"].get("hangs", {}).get("error") == error


def test_an_interrupted_worker_gets_time_to_save(tmp_path: Path) -> None:
    from watched import Watched

    saved = tmp_path / "saved"
    program = (
        "import signal, subprocess, sys, time\n"
        f"def save(*_):\n    time.sleep(0.5); open({str(saved)!r}, 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(KeyboardInterrupt), Watched([sys.executable, "-c", program]) as worker:
        assert next(worker.lines()) == "ready\n"
        raise KeyboardInterrupt
    assert saved.exists()


def test_rows_of_another_card_or_code_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_record
    from gpu_tables import all_details

    record: dict[str, Any] = {}
    group(record).put("steps", "a", {"figure": 1})
    group(record, torch="2.13.0").put("steps", "a", {"figure": 2})
    monkeypatch.setattr(gpu_record, "code", lambda: "0123456789")
    group(record).put("steps", "a", {"figure": 3})
    rows = [found["steps"]["a"] for found in record["groups"].values()]
    assert [row["figure"] for row in rows] == [1, 2, 3]
    assert rows[1]["card"] == CARD | {"torch": "2.13.0"}
    assert rows[2]["code"] == "0123456789" and rows[0]["commit"]
    assert gpu_record.last_group(record)["steps"]["a"]["figure"] == 3
    assert all_details(record).count("## Earlier: A card, 16 GiB, driver 1") == 2


def test_no_path_of_the_machine_is_stored() -> None:
    from common import ROOT, without_places

    row = {
        "error": f"CalledProcessError: ['/usr/bin/python3', '{ROOT}/benchmarks/loop_times.py']",
        "said": ["waits, at /opt/x/torch/nn/functional.py:12 (a value is read)"],
        "figure": 1.5,
        "unit": "s/epoch, captured / floor, https://hydra.cc/docs",
    }
    assert without_places(row) == {
        "error": "CalledProcessError: ['python3', 'benchmarks/loop_times.py']",
        "said": ["waits, at functional.py:12 (a value is read)"],
        "figure": 1.5,
        "unit": "s/epoch, captured / floor, https://hydra.cc/docs",
    }


def test_what_compiles_comes_late_and_trainings_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    items = {"steps": ["a, off", "a, compile", "slow"], "accuracy": ["lite"], "loops": ["b"]}
    monkeypatch.setattr(
        gpu, "SECTIONS", {name: lambda plan, f=found: f for name, found in items.items()}
    )
    stored = group(sections={"steps": {"slow": {"error": "it took more than 600 s"}}})
    plan = gpu.Plan("cuda", False, time.time() + 60)
    assert gpu.in_order(plan, list(items), "", stored) == [
        ("steps", ["a, off"]), ("loops", ["b"]), ("steps", ["a, compile", "slow"]),
        ("accuracy", ["lite"]),
    ]  # fmt: skip


def test_a_distribution_that_comes_inside_another_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gpu
    import gpu_sections

    monkeypatch.setattr(gpu_sections, "version", lambda name: None)
    plan = gpu.Plan("cpu", True, time.time() + 60)
    gpu.check(plan)
    found = gpu_sections.environment(plan)["here"]()
    assert found["lightning-fabric"] == "part of another package"
    monkeypatch.setattr(gpu, "importable", lambda module: module != "pydantic")
    with pytest.raises(SystemExit, match="needs pydantic"):
        gpu.check(plan)


def test_again_begins_a_training_anew_and_only_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu_trials

    class Ended:
        returncode = 0

        def __init__(self, *given: Any, **other: Any) -> None: ...

        def wait(self, timeout: float) -> None: ...

    monkeypatch.setattr(gpu_trials, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_trials.subprocess, "Popen", Ended)
    left = tmp_path / "outputs" / "gpu" / "card" / "lite-metr_la_29-seed0-cpu" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    for anew in (False, True):
        row = gpu_trials.accuracy("lite", "metr_la_29", 0, "cpu", 1.0, group="card", anew=anew)
        assert left.exists() is not anew
        assert row["done"] is False


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
    gpu.measure(gpu.Plan("cpu", True, time.time() + 60), "steps", ["a"], group())


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


def test_an_epoch_that_reads_a_value_in_every_step_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gpu_sections import TINY
    from gpu_waiting import waiting

    from expt.training.average import NoAverage

    row = waiting("cpu", 2, *TINY)
    assert row["readings"] is not None and row["steps"] == 4
    monkeypatch.setattr(NoAverage, "update", lambda self, step: torch.zeros(()).item())
    with pytest.raises(AssertionError, match="readings grow with the steps"):
        waiting("cpu", 2, *TINY)


def test_the_watched_epochs_are_as_long_as_they_are_said_to_be() -> None:
    """minimal's own batches of the week: an epoch that ended early would not be twice as long."""
    from common import make_trainer
    from gpu_correctness import common
    from gpu_sections import TINY, WATCHED_STEPS
    from gpu_waiting import WARM_STEPS, epoch

    sizes = [line for line in TINY if "batch_size" not in line]
    trainer = make_trainer(*common("cpu"), *sizes)
    full = trainer.data.size("train") // trainer.data.batch_size
    assert full >= WARM_STEPS + 2 * WATCHED_STEPS
    with pytest.raises(ValueError, match=r"an epoch has .* steps, and 10008 are asked for"):
        epoch("cpu", 10_000, *sizes)
