"""What a user sees while a run goes on: one bar on a terminal, plain lines elsewhere.

Also ``progress.json`` beside the checkpoints, for whoever watches from another process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from expt.files import write_json
from expt.job import Metric
from expt.units import format_bytes, format_seconds

FILE_NAME = "progress.json"
LINE_INTERVAL_SECONDS = 30.0
WRITE_INTERVAL_SECONDS = 0.05
"""The file is replaced at most this often between validations."""
WRITE_SHARE = 0.0005
"""And no more often than takes this part of the time, since some disks are slow to rename."""


def epoch_line(
    row: Mapping[str, float], monitor: Metric, best: bool, peak_bytes: int | None
) -> str:
    """Return a finished epoch, a row of the history, in a line; the best so far has a star."""
    return (
        f"epoch {row['epoch']:3.0f}  step {row['step']:.0f}  train loss {row['loss']:.3f}  "
        f"val {monitor.name} {monitor.text(row['val'], unit=monitor.percent)}"
        f"{' *' if best else '  '}"
        f"  peak {format_bytes(peak_bytes)}  {format_seconds(row['seconds'])}"
    )


class Display(Protocol):
    """How progress is shown; the loop calls these and knows nothing else."""

    def start(self, total_steps: int, step: int) -> None:
        """Begin, possibly in the middle of a resumed run."""

    def step(self, step: int, loss: float | None) -> None:
        """Show one more optimizer step; `loss` only where it was read from the device."""

    def memory(self, words: str) -> None:
        """Show what memory is in use now."""

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

    def memory(self, words: str) -> None:
        """Do nothing."""

    def epoch(self, line: str, value: str, peak_bytes: int | None) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class LineDisplay(SilentDisplay):
    """A plain line per epoch, and one now and then in between: for logs, files and pipes."""

    def __init__(self) -> None:
        self._total = 0
        self._memory = ""
        self._printed = time.monotonic()

    def start(self, total_steps: int, step: int) -> None:
        """Note how far there is to go."""
        self._total = total_steps

    def step(self, step: int, loss: float | None) -> None:
        """Print a line if there was none for a while."""
        now = time.monotonic()
        if loss is not None and now - self._printed >= LINE_INTERVAL_SECONDS:
            self._printed = now
            print(
                f"           step {step}/{self._total}  loss {loss:.3f}{self._memory}", flush=True
            )

    def memory(self, words: str) -> None:
        """Keep it for the next line between epochs."""
        self._memory = words and f"  memory {words}"

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
            TextColumn(
                "loss {task.fields[loss]}  val {task.fields[val]}  {task.fields[peak]}",
                markup=False,
            ),
            TextColumn("{task.fields[memory]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=1,  # each takes milliseconds from the training
        )
        self._task = self._bar.add_task("training", loss="-", val="-", peak="", memory="")

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

    def memory(self, words: str) -> None:
        """Show it beside the bar."""
        self._bar.update(self._task, memory=words and f"memory {words}")

    def epoch(self, line: str, value: str, peak_bytes: int | None) -> None:
        """Print the epoch's line above the bar."""
        self._bar.console.print(line, highlight=False, markup=False, emoji=False)
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

    Args:
        folder: without one nothing is written.
        name: ``val/`` and the metric that is monitored.
        facts: what does not change, and is of use to whoever watches.

    """

    def __init__(
        self, folder: Path | None, name: str, facts: Mapping[str, int | None] | None = None
    ) -> None:
        self.path, self.name = None if folder is None else folder / FILE_NAME, name
        self._facts = {key: one for key, one in (facts or {}).items() if one is not None}
        self._due = 0.0

    def write(
        self,
        step: int,
        epoch: int,
        value: float | None,
        force: bool = False,
        memory: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Replace the file, unless it was a moment ago; `memory` is asked for what is in use."""
        start = time.monotonic()
        if self.path is None or (not force and start < self._due):
            return
        row: dict[str, Any] = {"step": step, "epoch": epoch, self.name: value, **self._facts}
        if held := memory():
            row["memory"] = held
        write_json(self.path, row, durable=False)
        took = time.monotonic() - start
        self._due = start + max(WRITE_INTERVAL_SECONDS, took / WRITE_SHARE)
