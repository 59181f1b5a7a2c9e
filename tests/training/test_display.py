from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

import expt.training.display as module
from expt.errors import StorageError
from expt.training.display import (
    WRITE_INTERVAL_SECONDS,
    WRITE_SHARE,
    BarDisplay,
    Display,
    LineDisplay,
    ProgressFile,
    SilentDisplay,
    choose_display,
)

LINE = "epoch   1  step 10  train loss 3.210  val mae 3.456 *  peak [0.10 GiB]  8.2 s"


def show(display: Display) -> None:
    display.start(total_steps=20, step=0)
    for step in range(1, 11):
        display.step(step, 3.21 if step % 2 == 0 else None)
    display.epoch(LINE, "3.456", 1 << 30)
    display.stop()


def test_a_line_per_epoch_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = choose_display(True)
    assert isinstance(display, LineDisplay)
    show(display)
    assert capsys.readouterr() == (LINE + "\n", "")


def test_lines_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    LineDisplay().epoch(LINE, "3.456", None)
    assert raw.getvalue().decode() == LINE + "\n"


def test_nothing_if_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    display = choose_display(False)
    assert type(display) is SilentDisplay
    show(display)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(choose_display(True), BarDisplay)


def test_the_bar_shows_step_loss_validation_and_peak() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    show(BarDisplay(console))
    shown = screen.getvalue()
    for part in ("epoch   1  step 10", "10/20", "loss 3.210", "val 3.456", "peak 1.00 GiB"):
        assert part in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_brackets_on_the_bars_console_are_text() -> None:
    screen = io.StringIO()
    bar = BarDisplay(Console(file=screen, force_terminal=True, width=120, color_system=None))
    bar.start(total_steps=20, step=0)
    bar.epoch("val L1 [deg] 3.456", "3.456 [deg]", None)
    bar.stop()
    assert screen.getvalue().count("[deg]") >= 2


def test_the_bar_of_a_resumed_run_begins_where_it_was() -> None:
    screen = io.StringIO()
    bar = BarDisplay(Console(file=screen, force_terminal=True, width=120, color_system=None))
    bar.start(total_steps=20, step=15)
    bar.stop()
    assert "15/20" in screen.getvalue()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Set the clock by setting its only element."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_file_says_step_epoch_and_validation(tmp_path: Path) -> None:
    ProgressFile(tmp_path / "checkpoints", "val/mae").write(10, 2, 3.5)
    path = tmp_path / "checkpoints" / "progress.json"
    assert json.loads(path.read_text()) == {"step": 10, "epoch": 2, "val/mae": 3.5}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("val", [None, float("nan")])
def test_no_validation_yet_is_null(tmp_path: Path, val: float | None) -> None:
    file = ProgressFile(tmp_path, "val/mae")
    file.write(1, 0, val)
    assert json.loads(file.path.read_text())["val/mae"] is None


def test_the_file_is_not_written_at_every_step(tmp_path: Path, clock: list[float]) -> None:
    file = ProgressFile(tmp_path, "val/mae")

    def stored() -> int:
        return int(json.loads(file.path.read_text())["step"])

    file.write(1, 0, None)
    assert stored() == 1
    clock[0] += WRITE_INTERVAL_SECONDS * 0.9
    file.write(2, 0, None)
    assert stored() == 1
    file.write(3, 0, None, force=True)
    assert stored() == 3
    clock[0] += WRITE_INTERVAL_SECONDS * 0.9
    file.write(4, 0, None)
    assert stored() == 3  # the interval began anew
    clock[0] += WRITE_INTERVAL_SECONDS * 0.2
    file.write(5, 0, None)
    assert stored() == 5


def test_a_disk_that_refuses_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(StorageError):
        ProgressFile(tmp_path / "checkpoints", "val/mae").write(1, 0, None)


def test_lines_between_epochs_come_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    display = LineDisplay()
    display.start(60, 0)
    display.step(1, 9.0)
    assert capsys.readouterr().out == ""
    now += 31
    display.step(2, 8.5)
    display.step(3, 8.0)
    assert capsys.readouterr().out.split() == ["step", "2/60", "loss", "8.500"]


def test_a_slow_disk_is_not_asked_more_often_than_it_can_answer(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ProgressFile(tmp_path, "val/mae")
    written: list[int] = []

    def slow(path: Path, value: dict[str, int], durable: bool) -> None:
        clock[0] += 0.01
        written.append(value["step"])

    monkeypatch.setattr(module, "write_json", slow)
    file.write(1, 0, None)
    clock[0] += 0.9 * 0.01 / WRITE_SHARE
    file.write(2, 0, None)
    assert written == [1]
    clock[0] += 0.1 * 0.01 / WRITE_SHARE
    file.write(3, 0, None)
    assert written == [1, 3]


def test_memory_is_in_the_bar_and_in_the_lines_between_epochs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    bar = BarDisplay(Console(file=screen, force_terminal=True, width=160, color_system=None))
    bar.start(20, 0)
    bar.memory("3.10 GiB of 4.00 GiB")
    bar.stop()
    assert "memory 3.10 GiB of 4.00 GiB" in screen.getvalue()
    monkeypatch.setattr(module, "LINE_INTERVAL_SECONDS", 0.0)
    lines = LineDisplay()
    lines.start(20, 0)
    lines.memory("3.10 GiB of 4.00 GiB")
    lines.step(4, 2.0)
    assert "step 4/20  loss 2.000  memory 3.10 GiB of 4.00 GiB" in capsys.readouterr().out


def test_the_file_says_what_a_watcher_needs(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path, "val/mae", {"total_steps": 9, "budget_bytes": None})
    file.write(1, 0, None, memory=lambda: {"host": {"allocated_bytes": 5}})
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "step": 1,
        "epoch": 0,
        "val/mae": None,
        "total_steps": 9,
        "memory": {"host": {"allocated_bytes": 5}},
    }
