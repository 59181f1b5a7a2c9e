"""Watch a run (`watch.run`) or a process (`watch.pid`) until it ends, `watch.duration`, or Ctrl-C.

Shown live, and kept in the command's own directory: ``watch.csv`` (readings, bounded),
``watch.html`` (reads itself again while it goes on), and at the end ``watch.png`` and
``watch.json``. A look takes milliseconds and asks nothing of the process that is watched.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from expt.commands.watch.screen import Screen, choose_screen
from expt.commands.watch.session import Session
from expt.commands.watch.targets import ProcessTarget, RunTarget, Target
from expt.config.command_nodes import WatchConfig
from expt.config.settings import RunContext
from expt.errors import ConfigError
from expt.files import write_json, write_text
from expt.memory.watching.history import to_csv
from expt.memory.watching.processes import find_cards
from expt.reports.figures.memory import plot_memory
from expt.reports.watch_page import WatchPage, render
from expt.training.interruption import Interruption
from expt.units import format_bytes

CSV_NAME, PAGE_NAME, RESULT_NAME = "watch.csv", "watch.html", "watch.json"
WRITE_SECONDS = 5.0
"""Between two writes of the files."""
NAP_SECONDS = 0.1
"""How late a signal may be noticed."""


@dataclass(frozen=True)
class WatchResult:
    """What was seen; the exit code is that of the signal that ended it, if one did."""

    session: Session
    ending: str
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> WatchResult:
    """Watch until there is nothing to watch any more.

    Raises:
        ConfigError: a setting out of range, or nothing there to watch.

    """
    node = cast(WatchConfig, OmegaConf.to_object(cfg.watch))
    if problems := node.problems():
        raise ConfigError(problems)
    cards, note = find_cards()
    if node.run is not None:
        target: Target = RunTarget(Path(node.run).expanduser(), cards)
    else:
        assert node.pid is not None
        target = ProcessTarget(node.pid, cards)
    with Interruption() as interruption:
        watch = Watch(target, node, context.run_dir, [note] if note else [])
        ending = watch.run(lambda: interruption.received is not None)
    number = interruption.received
    return WatchResult(watch.session, ending, 0 if number is None else 128 + number)


class Watch:
    """One watch: looks at a target, shows it, and keeps files of it."""

    def __init__(self, target: Target, node: WatchConfig, folder: Path, notes: list[str]) -> None:
        self.target, self.node, self.folder = target, node, folder
        self.session = Session(node.alarm)
        self._notes = notes
        self._began = time.monotonic()
        self._next_write = 0.0

    def run(self, stopped: Callable[[], bool], screen: Screen | None = None) -> str:
        """Look until the end; return why it ended."""
        screen = screen or choose_screen()
        try:
            screen.say(f"watching {self.target.title}")
            for note in self._notes:
                screen.say(note)
            screen.say(f"page: {self.folder / PAGE_NAME}")
            import_module("scipy.stats")  # for forecasts; later it would hold up a look for long
            self._began = time.monotonic()
            ending = self._looks(stopped, screen)
        finally:
            screen.close()
        self._write(ending)
        pictures = plot_memory(self.session.watched(), self.folder)
        summary = self.session.summary()
        write_json(self.folder / RESULT_NAME, self._record(ending))
        print("\n".join((ending, *summary)))
        kept = [self.folder / name for name in (CSV_NAME, PAGE_NAME, RESULT_NAME)] + pictures[:1]
        print(f"files: {shlex.join(map(str, kept))}")
        return ending

    def _looks(self, stopped: Callable[[], bool], screen: Screen) -> str:
        duration, due = self.node.duration, self._began
        while True:
            seconds = round(time.monotonic() - self._began, 3)
            look = self.target.look(seconds)
            if look is None:
                return self.target.ending()
            for lines in self.session.add(look):
                for line in lines:
                    screen.say(line)
            screen.show(self.session.progress(), self.session.words())
            if time.monotonic() >= self._next_write:
                self._write(None)
                self._next_write = time.monotonic() + max(WRITE_SECONDS, self.node.interval)
            due = max(due + self.node.interval, time.monotonic())
            while (left := due - time.monotonic()) > 0:
                if stopped():
                    return "stopped by a signal; what is watched goes on"
                if duration is not None and time.monotonic() - self._began >= duration:
                    return f"watched for {duration:g} s; what is watched goes on"
                time.sleep(min(left, NAP_SECONDS))

    def _write(self, ending: str | None) -> None:
        """Replace table and page; `ending` is None while it goes on."""
        session = self.session
        readings = {device.name: device.readings for device in session.watched()}
        write_text(self.folder / CSV_NAME, to_csv(readings, clock="seconds"), durable=False)
        tree = self.target.tree
        counted_how = "" if tree.shared_once else "; what they share is counted for each"
        about = f"host memory is that of {len(tree.pids)} processes" + counted_how
        cards = [(session.progress(), "the run")] if session.progress() else []
        for device in session.watched():
            last = device.readings[-1]
            cards.append((format_bytes(last.allocated_bytes), f"{device.name}, in use"))
        page = WatchPage(
            self.target.title,
            ending or "  |  ".join(session.words()),
            cards,
            session.watched(),
            session.alarms,
            [about if len(tree.pids) > 1 else "host memory is that of one process", *self._notes],
            None if ending is not None else max(WRITE_SECONDS, self.node.interval),
        )
        write_text(self.folder / PAGE_NAME, render(page), durable=False)

    def _record(self, ending: str) -> dict[str, Any]:
        histories = self.session.histories
        return {
            "target": self.target.title,
            "ending": ending,
            "alarm": self.node.alarm,
            "devices": {name: one.statistics() for name, one in histories.items()},
            "alarms": self.session.alarms,
        }
