"""What can be watched: any process of this machine, or a run, which also tells of itself.

A run says in ``run.lock`` which process it is and in ``progress.json`` how far it has come, what
it holds, and its budget; those readings are CUDA's allocator's, or its ledger's, and say more than
a process seen from outside. Its host memory is seen from outside, with loader workers and ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from expt.config.compose import typed
from expt.errors import ConfigError
from expt.locks import RUN_LOCK
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.alarms import ALARMS_NAME, load_alarms
from expt.memory.watching.history import READINGS_NAME, from_csv
from expt.memory.watching.processes import Cards, ProcessTree
from expt.result import CHECKPOINTS, FILE_NAME, LAUNCH_NAME, RunResult, load_result
from expt.training.display import FILE_NAME as PROGRESS_NAME
from expt.units import counted, format_bytes

CLOCK_TICK = 1.0
"""Seconds that a process may seem to be younger than the file it wrote."""


@dataclass(frozen=True)
class Look:
    """What was seen at once: readings by device, and how far a run has come."""

    readings: dict[str, Reading]
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    predicted: Mapping[str, int] = field(default_factory=dict)
    """The predicted peak, by the device that it is of."""
    alarms: tuple[Mapping[str, Any], ...] = ()
    """Alarms that the run itself rang since the last look."""


class Target(Protocol):
    """What is watched."""

    title: str
    tree: ProcessTree

    def look(self, seconds: float) -> Look | None:
        """Return what is seen so many seconds after the start; None once it has ended."""

    def ending(self) -> str:
        """Say how it ended."""


class ProcessTarget:
    """Any process, and what it has started."""

    def __init__(self, pid: int, cards: Cards | None, setting: str = "watch.pid") -> None:
        self.tree = ProcessTree(pid, setting)
        self.title = f"process {pid}: {self.tree.command[:80]}"
        self._cards = cards

    def look(self, seconds: float) -> Look | None:
        """Return host memory, and that of the cards it is on."""
        host = self.tree.look(seconds)
        if host is None:
            return None
        cards = {} if self._cards is None else self._cards.look(seconds, self.tree.pids)
        return Look({**cards, "host": host})

    def ending(self) -> str:
        """Say that it ended: only its parent is told how."""
        return "the process has ended"


class RunTarget(ProcessTarget):
    """A run that goes on.

    Raises:
        ConfigError: there is no run, or it has ended.

    """

    def __init__(self, run_dir: Path, cards: Cards | None) -> None:
        self.run_dir = run_dir
        lock = run_dir / RUN_LOCK
        try:
            pid, since = int(lock.read_text()), lock.stat().st_mtime
        except (OSError, ValueError):
            raise ConfigError(not_running(run_dir)) from None
        try:
            super().__init__(pid, cards, f"watch.run={run_dir}, process")
        except ConfigError as error:
            if "no such process" in str(error):
                raise ConfigError(not_running(run_dir, pid)) from error
            raise
        if self.tree.started > since + CLOCK_TICK:  # another one has its number now
            raise ConfigError(not_running(run_dir, pid))
        self.title = f"run {run_dir}"
        self._written = 0
        self._since = since
        self._told = load_alarms(run_dir / ALARMS_NAME)
        self._last = Look({})

    def look(self, seconds: float) -> Look | None:
        """Return what the run tells of itself, where it is new, and its processes' host memory."""
        outside = super().look(seconds)
        if outside is None:
            return None
        told, readings = self._progress(), dict(outside.readings)
        own = {} if told is None else {n: r for n, r in told.items() if n != "host"}
        if any(name.startswith("cuda") for name in own):  # the allocator knows more than NVML
            readings = {"host": readings["host"]}
        for name, row in own.items():
            reserved, other, peak, total = (row.get(key) for key in COUNTS)
            held = row["allocated_bytes"]
            readings[name] = Reading(seconds, held, reserved, other, peak, total)
        alarms = load_alarms(self.run_dir / ALARMS_NAME)
        # The file has the last ones only, so that their number says nothing.
        new, self._told = tuple(row for row in alarms if row not in self._told), alarms
        last = self._last
        return Look(readings, last.step, last.total_steps, last.epoch, last.predicted, new)

    def _progress(self) -> dict[str, dict[str, Any]] | None:
        """Take over how far the run is; return its own readings if they are new."""
        path = self.run_dir / CHECKPOINTS / PROGRESS_NAME
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            status = path.stat()
            if status.st_mtime_ns == self._written or status.st_mtime < self.tree.started:
                return None  # a reading that was seen already, or of the part before a resume
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._written = status.st_mtime_ns
            memory: dict[str, dict[str, Any]] = stored.get("memory", {})
            predicted = stored.get("predicted_peak_bytes")
            tensors = [name for name in memory if name != "host"]
            self._last = Look(
                {}, stored["step"], stored.get("total_steps"), stored["epoch"],
                {} if predicted is None else dict.fromkeys(tensors, predicted),
            )  # fmt: skip
            return memory
        return None

    def ending(self) -> str:
        """Say how the run ended, from its record if it wrote one."""
        result = _result_since(self.run_dir, self._since)
        if result is None:
            return "the run has ended without a record: it was killed"
        return f"the run has ended: {in_words(result)}"


def _result_since(run_dir: Path, since: float) -> RunResult | None:
    """Return how a run ended, unless that was before `since`, in a part that it went on from."""
    with suppress(OSError):
        if (run_dir / FILE_NAME).stat().st_mtime >= since:
            return load_result(run_dir)
    return None


def _held_since(run_dir: Path) -> float:
    """Return when a run took its lock, of which a killed one leaves the file; else 0."""
    with suppress(OSError):
        return (run_dir / RUN_LOCK).stat().st_mtime
    return 0.0


COUNTS = ("reserved_bytes", "other_bytes", "peak_bytes", "total_bytes")


def in_words(result: RunResult) -> str:
    """Return how a run ended: ``completed (epochs) after 8 steps, peak 9.6 MiB``."""
    peak = result.memory["peak_allocated_bytes"]
    measured = "" if peak is None else f", peak {format_bytes(peak)}"
    return f"{result.status} ({result.stop_reason}) after {counted(result.steps, 'step')}{measured}"


def not_running(run_dir: Path, pid: int | None = None) -> str:
    """Say why there is nothing to watch in a folder, and what is known of a run that ended."""
    setting, resume = f"watch.run={run_dir}", typed("trainer.resume", run_dir)
    if not run_dir.is_dir():
        return f"{setting}: there is no such folder"
    result = _result_since(run_dir, _held_since(run_dir))
    if result is not None:
        when = datetime.fromtimestamp((run_dir / FILE_NAME).stat().st_mtime)
        return (
            f"{setting}: the run ended {when:%Y-%m-%d %H:%M}, {in_words(result)}; "
            f"{_recorded(run_dir)}"
        )
    if pid is not None:
        return (
            f"{setting}: the run was killed: its process {pid} is gone (or on another machine), "
            f"and there is no result; {resume} goes on with it"
        )
    if (run_dir / LAUNCH_NAME).exists():
        return f"{setting}: the run is not going on; {resume} goes on with it"
    return f"{setting}: there is no run in this folder"


def _recorded(run_dir: Path) -> str:
    """Say what ``memory.csv`` of a run has."""
    try:
        text = (run_dir / READINGS_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "it recorded no readings"
    parts = []
    for name, readings in from_csv(text, until=float("inf")).items():
        counts = [reading.allocated_bytes for reading in readings]
        lowest, highest = format_bytes(min(counts)), format_bytes(max(counts))
        parts.append(f"{name} {lowest} to {highest} in {counted(len(counts), 'reading')}")
    return f"its memory.csv: {'; '.join(parts)}" if parts else "it recorded no readings"
