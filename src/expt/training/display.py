"""What a user sees while a run goes on: one bar on a terminal, plain lines elsewhere.

Also ``progress.json`` beside the checkpoints, for whoever watches from another process.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from expt.files import write_json
from expt.units import format_bytes

FILE_NAME = "progress.json"
LINE_INTERVAL_SECONDS = 30.0
WRITE_INTERVAL_SECONDS = 0.05
"""The file is replaced at most this often between validations."""
WRITE_SHARE = 0.0005
"""And no more often than takes this part of the time, since some disks are slow to rename."""


class Display(Protocol):
    """How progress is shown; the loop calls these and knows nothing else."""

    def start(self, total_steps: int, step: int) -> None:
        """Begin, possibly in the middle of a resumed run."""

    def step(self, step: int, loss: float | None) -> None:
        """Show one more optimizer step; `loss` only where it was read from the device."""

    def epoch(self, line: str, value: str, peak_bytes: int | None) -> None:
        """Show a finished epoch."""

    def stop(self) -> None:
        """End; must leave the terminal as it was."""


class SilentDisplay:
    """Shows nothing."""

    def start(self, total_steps: int, step: int) -> None:
        """Do nothing."""

    def step(self, step: int, loss: float | None) -> None:
        """Do nothing."""

    def epoch(self, line: str, value: str, peak_bytes: int | None) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class LineDisplay(SilentDisplay):
    """A plain line per epoch, and one now and then in between: for logs, files and pipes."""

    def __init__(self) -> None:
        self._total = 0
        self._printed = time.monotonic()

    def start(self, total_steps: int, step: int) -> None:
        """Note how far there is to go."""
        self._total = total_steps

    def step(self, step: int, loss: float | None) -> None:
        """Print a line if there was none for a while."""
        now = time.monotonic()
        if loss is not None and now - self._printed >= LINE_INTERVAL_SECONDS:
            self._printed = now
            print(f"           step {step}/{self._total}  loss {loss:.3f}", flush=True)

    def epoch(self, line: str, value: str, peak_bytes: int | None) -> None:
        """Print the epoch's line."""
        self._printed = time.monotonic()
        print(line, flush=True)


class BarDisplay:
    """One bar for the run: loss, the monitored figure, peak memory, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  val {task.fields[val]}  {task.fields[peak]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=1,  # each takes milliseconds from the training
        )
        self._task = self._bar.add_task("training", loss="-", val="-", peak="")

    def start(self, total_steps: int, step: int) -> None:
        """Draw the bar."""
        self._bar.update(self._task, total=total_steps, completed=step)
        self._bar.start()

    def step(self, step: int, loss: float | None) -> None:
        """Move the bar."""
        if loss is None:
            self._bar.update(self._task, completed=step)
        else:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}")

    def epoch(self, line: str, value: str, peak_bytes: int | None) -> None:
        """Print the epoch's line above the bar."""
        self._bar.console.print(line, highlight=False)
        self._bar.update(self._task, val=value, peak=f"peak {format_bytes(peak_bytes)}")

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def choose_display(enabled: bool) -> Display:
    """Return a bar on a terminal, lines elsewhere, nothing if not wanted."""
    if not enabled:
        return SilentDisplay()
    if sys.stdout.isatty():
        return BarDisplay(Console())
    return LineDisplay()


class ProgressFile:
    """Keeps ``progress.json`` (`step`, `epoch`, and under `name` the last validation), cheaply.

    `name` is ``val/`` and the metric that is monitored.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / FILE_NAME, name
        self._due = 0.0

    def write(self, step: int, epoch: int, value: float | None, force: bool = False) -> None:
        """Replace the file, unless it was a moment ago."""
        start = time.monotonic()
        if not force and start < self._due:
            return
        write_json(self.path, {"step": step, "epoch": epoch, self.name: value}, durable=False)
        took = time.monotonic() - start
        self._due = start + max(WRITE_INTERVAL_SECONDS, took / WRITE_SHARE)
