"""`task=watch` from its command line, on a process that this test ends, and every mistake."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from expt.commands.watch import command as module
from expt.commands.watch.command import Watch
from expt.commands.watch.screen import LineScreen, TerminalScreen, choose_screen
from expt.commands.watch.targets import Look
from expt.config.command_nodes import WatchConfig
from expt.memory.diagnosis.log_reader import read_log
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.processes import ProcessTree

MIB = 1024**2


class Fake:
    """Grows by 20 MiB a look, up to its end."""

    title = "run <somewhere>"

    def __init__(self, looks: int) -> None:
        self.tree = ProcessTree(os.getpid())
        self.left, self.count = looks, 0

    def look(self, seconds: float) -> Look | None:
        if self.count == self.left:
            return None
        self.count += 1
        reading = Reading(float(self.count), self.count * 20 * MIB, None, None, None, 400 * MIB)
        return Look({"budget": reading}, self.count, 100, 0, {"budget": 300 * MIB})

    def ending(self) -> str:
        return "the run has ended: completed"


def test_a_watch_leaves_table_page_picture_and_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.0)
    during: list[str] = []
    target = Fake(19)
    target.look, looked = lambda s: (during.append(page(tmp_path)), looked(s))[1], target.look
    watch = Watch(target, WatchConfig(run="x", interval=0.0), tmp_path, ["a note"])
    assert watch.run(lambda: False) == "the run has ended: completed"
    out = capsys.readouterr().out
    assert "watching run <somewhere>\na note\n" in out
    assert "alarm: budget is at 95% of 400.0 MiB" in out
    assert "budget: at most 380.0 MiB (95% of 400.0 MiB)" in out
    assert read_log((tmp_path / "watch.csv").read_text()).readings[-1].allocated_bytes == 380 * MIB
    assert (tmp_path / "watch.csv").read_text().startswith("seconds,device,allocated_bytes")
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "watch.json").read_text())
    assert record["ending"] == "the run has ended: completed"
    assert record["devices"]["budget"]["peak_allocated_bytes"] == 380 * MIB
    assert 'http-equiv="refresh"' in during[-1]
    last = page(tmp_path)
    assert "refresh" not in last
    assert "run &lt;somewhere&gt;" in last
    for word in ("<svg", "limit 400.0 MiB", "predicted peak 300.0 MiB", "alarm: budget is at 95%"):
        assert word in last
    assert "http://" not in last and "https://" not in last and "<script" not in last


def page(folder: Path) -> str:
    path = folder / "watch.html"
    return path.read_text() if path.exists() else ""


def test_a_signal_ends_it_and_the_files_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(Fake(1000), WatchConfig(run="x"), tmp_path, [])
    assert "stopped by a signal" in watch.run(lambda: True)
    assert (tmp_path / "watch.csv").exists() and (tmp_path / "watch.json").exists()
    assert not (tmp_path / "watch.png").exists(), "there is no line through one reading"
    assert "stopped by a signal" in capsys.readouterr().out


def test_a_terminal_shows_lines_that_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    screen = TerminalScreen(Console(file=text, force_terminal=True, width=100))
    screen.say("watching [this]")
    for step in (1, 2):
        screen.show(f"step {step}", ["host 1 GiB", "budget 2 GiB"])
    screen.close()
    shown = text.getvalue()
    assert "watching [this]" in shown and "step 2" in shown and "budget 2 GiB" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor comes back"
    assert isinstance(choose_screen(), LineScreen)


def test_any_process_for_a_while(expt, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds pass by looks and naps only, however slow the machine is.
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    monkeypatch.setattr(module, "time", clock)
    code, out, err = expt(
        "task=watch", f"watch.pid={os.getpid()}", "watch.duration=0.5", "watch.interval=0.1",
        "hydra.run.dir=run", small=False,
    )  # fmt: skip
    assert code == 0, err
    assert f"watching process {os.getpid()}" in out
    assert "watched for 0.5 s; what is watched goes on" in out
    assert "host: at most" in out
    assert {"watch.csv", "watch.html", "watch.json", "watch.png"} <= {
        path.name for path in (home / "run").iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["watch.run", "watch.pid", "neither"]),
        (("watch.pid=1", "watch.run=x"), ["both"]),
        (("watch.pid=four",), ["watch.pid", "four"]),
        (("watch.pid=-4",), ["watch.pid", "-4"]),
        (("watch.pid=4194321",), ["watch.pid=4194321", "no such process"]),
        (("watch.run=nowhere",), ["watch.run=nowhere", "no such folder"]),
        (("watch.run=.",), ["watch.run=.", "no run"]),
        (("watch.pid=1", "watch.interval=0"), ["watch.interval", "0.1"]),
        (("watch.pid=1", "watch.duration=-1"), ["watch.duration"]),
        (("watch.pid=1", "watch.alarm=90"), ["watch.alarm", "0.9"]),
    ],
)
def test_a_mistake_is_one_clear_line(expt, home: Path, arguments, words) -> None:
    code, _, err = expt("task=watch", "hydra.run.dir=run", *arguments, small=False)
    assert code == 2
    message = err[err.index("error:") :].strip()
    assert "Traceback" not in err and "\n" not in message
    for word in words:
        assert word in message
    assert not (home / "run").exists()


def test_a_run_keeps_its_alarms_and_tells_what_it_holds(expt, home: Path) -> None:
    budget = 45_500_000  # a little above the peak
    code, _, err = expt("hydra.run.dir=done", f"memory.budget={budget}", "memory.plan=false")
    assert code == 0, err
    assert " % of the memory budget of 43.4 MiB in use at step 0, while" in err
    (alarm,) = json.loads((home / "done/alarms.json").read_text())
    assert (alarm["device"], alarm["total_bytes"]) == ("budget", budget)
    assert alarm["used_fraction"] > 0.9
    names = [tensor["what"] for tensor in alarm["largest"]]
    assert "data speed" in names and len(names) == 5, names
    told = json.loads((home / "done/checkpoints/progress.json").read_text())
    assert told["budget_bytes"] == budget and told["total_steps"] == 8
    assert 0 < told["memory"]["budget"]["allocated_bytes"] < budget
    assert "budget" in (home / "done/memory.csv").read_text()
    code, _, err = expt("task=watch", "watch.run=done", "hydra.run.dir=run", small=False)
    assert code == 2
    assert "completed (epochs) after 8 steps" in err
    assert "its memory.csv: host" in err and "budget 1" in err


def test_a_run_that_goes_as_planned_rings_nothing(expt, home: Path) -> None:
    code, _, err = expt("hydra.run.dir=done", "memory.budget=45MiB", "trainer.max_steps=2")
    assert code == 0, err
    assert "memory budget of" not in err
    assert not (home / "done/alarms.json").exists()
    record = json.loads((home / "done/result.json").read_text())["memory"]
    assert record["peak_allocated_bytes"] > 0.9 * 45 * MIB, "although it came near its budget"


def test_the_alarms_of_a_trial_are_in_its_file_only(expt, home: Path) -> None:
    (home / "search").mkdir()
    code, _, err = expt(
        "hydra.run.dir=done", "memory.budget=45500000", "memory.plan=false", "trainer.max_steps=1",
        "tracking.parent=search", "trainer.test=false",
    )  # fmt: skip
    assert code == 0, err
    assert "memory budget of" not in err
    (alarm,) = json.loads((home / "done/alarms.json").read_text())
    assert alarm["device"] == "budget"
