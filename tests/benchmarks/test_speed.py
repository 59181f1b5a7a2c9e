from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ("data=metr_la_week", "model.embed_dim=8", "model.num_stages=1", "data.batch_size=2")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The programs import each other from their own folder, and leave their runs here."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    monkeypatch.setattr(common, "ROOT", tmp_path)


def settings(*overrides: str) -> Any:
    from common import settings_for

    return settings_for("+memory=minimal", *SMALL, *overrides)


def test_the_bare_loops_windows_are_those_of_our_data_set() -> None:
    from rival_loops import Windows

    from expt.run.build import build

    data = build(settings(), "data")
    chosen = [0, 7, data.size("train") - 1]
    inputs, target = default_collate([Windows(data)[index] for index in chosen])
    batch = data.gather("train", torch.tensor(chosen))
    assert inputs.keys() == batch.inputs.keys()
    for name, value in inputs.items():
        assert torch.equal(value, batch.inputs[name]), name
    assert torch.equal(target, batch.target)


def test_the_bare_loops_loss_is_ours() -> None:
    from rival_loops import Rivals

    rivals = Rivals(settings("model.dropout=0"), "cpu")
    chosen = torch.tensor([3, 900])
    batch = rivals.data.gather("train", chosen)
    with torch.no_grad():
        ours = rivals.data.loss(rivals.model(**batch.inputs), batch)
        theirs = rivals.loss(dict(batch.inputs), batch.target)
    assert float(theirs) == pytest.approx(float(ours / rivals.data.weight("train", chosen)))


def test_every_contender_is_timed_in_every_round() -> None:
    from loop_times import measure

    row = measure("minimal", "cpu", 1, 2, None, *SMALL)
    for name in ("ours", "bare loop"):
        assert len(row[name]["rounds"]) == 1
        assert 0 < row[name]["seconds_per_step"] < 10
    assert row["bare loop"]["ours_over_it"] > 0


def test_a_lightning_that_fails_costs_its_own_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import loop_times

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        broken = command[2] == loop_times.LIGHTNING
        return SimpleNamespace(
            returncode=int(broken), stdout="2.0\n", stderr="Traceback\nOSError: /home/me/x.so: no\n"
        )

    monkeypatch.setattr(loop_times.subprocess, "run", run)
    row = loop_times.measure("minimal", "cpu", 2, 4, tmp_path)
    assert row["ours"]["rounds"] == [0.5, 0.5]
    assert row["failed"] == {"lightning": "OSError: x.so: no"}
    assert "lightning" not in row


def test_what_takes_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import bookkeeping

    from expt.tracking.tracker import NullTracker
    from expt.training.display import BarDisplay

    step = BarDisplay.step
    monkeypatch.setattr(bookkeeping, "open_tracker", lambda folder: NullTracker())

    def slow(self: BarDisplay, *arguments: Any) -> None:
        time.sleep(0.1)
        step(self, *arguments)

    row = bookkeeping.measure("minimal", "cpu", 8, *SMALL)
    monkeypatch.setattr(BarDisplay, "step", slow)
    slowed = bookkeeping.measure("minimal", "cpu", 8, *SMALL)
    lost = slowed["shares_of_an_epoch"]["display"] * slowed["seconds_per_step"]
    assert 0.1 <= lost < 0.5
    assert row["shares_of_an_epoch"]["display"] * row["seconds_per_step"] < 0.1
    assert slowed["share"] == pytest.approx(sum(slowed["shares_of_an_epoch"].values()))
    assert row["steps_of_an_epoch"] == -(-1395 // 2)  # 70 % of the week's 1993 windows


def test_the_cost_grows_with_sensors_and_batch_and_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import step_costs
    from step_costs import measure, plot

    # Of this process: beside others, a step of one window may last longer than one of six.
    monkeypatch.setattr(step_costs, "now", lambda device: time.process_time())
    result = measure(["minimal"], [67, 207], [1, 6], "cpu", 1, 1, None)
    cost = {(row["sensors"], row["batch_size"]): row["seconds_per_step"] for row in result["rows"]}
    assert cost[207, 6] > max(cost[207, 1], cost[67, 6]) > min(cost.values()) > 0
    assert result["middle"] == "67 sensors of metr_la_week"
    plot(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_ones_own_takes_the_place_of_the_week(tmp_path: Path) -> None:
    from step_costs import MIDDLE, cut

    with np.load(cut(tmp_path)) as week:
        assert week["speed"].shape == (2016, MIDDLE)


def test_help_is_compared_with_a_bare_application() -> None:
    from launch_times import help_times

    found = help_times(1)
    assert found.keys() == {"expt", "bare Hydra"}
    assert all(0.05 < row["seconds"] < 60 for row in found.values())


def test_a_run_that_takes_no_step_is_an_error_with_its_message(tmp_path: Path) -> None:
    from launch_times import first_step_seconds

    with pytest.raises(RuntimeError, match=r"no optimizer step was seen: .*embed_dimm"):
        first_step_seconds(tmp_path, "run", "model.embed_dimm=3")


def test_sections_that_are_stored_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import speed

    stored = {"help": {"result": {}}, "loops": {"result": {}}}
    written: list[dict[str, Any]] = []
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=json.dumps({"measured": command[-1]}))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(speed, "load", lambda name: dict(stored))
    monkeypatch.setattr(speed, "store", lambda name, record, text: written.append(dict(record)))
    monkeypatch.setattr(speed, "tables", lambda record: "")
    monkeypatch.setattr(speed, "provenance", lambda: {"commit": "0"})
    monkeypatch.setattr(sys, "argv", ["speed.py", "--sections", "help", "bookkeeping"])
    speed.main()
    assert [command[-1] for command in commands] == ["bookkeeping"]
    assert written[-1]["bookkeeping"]["result"] == {"measured": "bookkeeping"}
    assert written[-1]["help"] == stored["help"]
    monkeypatch.setattr(sys, "argv", ["speed.py", "--sections", "help", "--again"])
    speed.main()
    assert commands[-1][-1] == "help"
    assert capsys.readouterr().out.split() == ["bookkeeping", "help"]


def test_absent_lightning_is_said_and_not_invented() -> None:
    import speed

    row = {
        "preset": "lite",
        "ours": {"seconds_per_step": 0.1},
        "bare loop": {"seconds_per_step": 0.2, "ours_over_it": 0.5},
    }
    assert speed.loop_row(row) == ("lite", "100.0", "200.0", "not installed", "0.50")
    failed = {**row, "failed": {"lightning": "ImportError: no such thing"}}
    assert speed.loop_row(failed)[3] == "failed"


def test_contenders_on_a_cpu_differ_in_one_thing_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import common
    import cpu_contenders

    asked: list[tuple[list[str], str]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        asked.append((command[5:], env["OMP_NUM_THREADS"]))
        if "trainer.compile=compile" in command:
            raise subprocess.TimeoutExpired(command, 1.0)
        row = {"seconds_per_step": 0.5 if "memory.precision=bf16" in command else 1.0}
        return SimpleNamespace(returncode=0, stdout=json.dumps(row), stderr="")

    monkeypatch.setattr(cpu_contenders.subprocess, "run", run)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 5, 6}, raising=False)
    result = cpu_contenders.measure(["lite"], [29], 1.0)
    assert asked == [
        (["memory.precision=fp32", "trainer.compile=off"], "4"),
        (["memory.precision=bf16", "trainer.compile=off"], "4"),
        (["memory.precision=fp32", "trainer.compile=compile"], "4"),
        (["memory.precision=fp32", "trainer.compile=off"], "1"),
    ]
    (line,) = cpu_contenders.table_rows(result)
    assert line == ("lite, 29", "1000", "500 (x2.00)", "not measured", "1000 (x1.00)")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert common.cores() == 1
    result["rows"][2] = {**result["rows"][0], "contender": "compile", "said": ["no compiler"]}
    assert cpu_contenders.table_rows(result)[0][3] == "stayed eager"
    assert result["processor"].keys() == set(cpu_contenders.FLAGS)
    monkeypatch.setattr(cpu_contenders, "BUDGET_SECONDS", 0.0)
    late = cpu_contenders.measure(["lite"], [29], 1.0)["rows"]
    assert {row["error"] for row in late} == {"not reached within 0 s"}
