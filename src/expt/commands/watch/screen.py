"""Where a watch is shown: lines that are replaced on a terminal, else one plain line a look."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Screen(Protocol):
    """What a watch is shown on."""

    def show(self, progress: str, words: Sequence[str]) -> None:
        """Show what is in use now."""

    def say(self, line: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """End; must leave the terminal as it was."""


class LineScreen:
    """Plain lines, for logs, files and pipes."""

    def show(self, progress: str, words: Sequence[str]) -> None:
        """Print one line with the time."""
        parts = "  |  ".join(filter(None, (progress, *words)))
        print(f"{datetime.now():%H:%M:%S}  {parts}", flush=True)

    def say(self, line: str) -> None:
        """Print it."""
        print(line, flush=True)

    def close(self) -> None:
        """Do nothing."""


class TerminalScreen:
    """Lines that are replaced at every look."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def show(self, progress: str, words: Sequence[str]) -> None:
        """Replace what is shown."""
        self._live.update(Text("\n".join(filter(None, (progress, *words)))), refresh=True)

    def say(self, line: str) -> None:
        """Print it above."""
        self._live.console.print(Text(line))

    def close(self) -> None:
        """Leave the last lines standing."""
        self._live.stop()


def choose_screen() -> Screen:
    """Return lines that are replaced on a terminal, plain ones elsewhere."""
    if sys.stdout.isatty():
        return TerminalScreen(Console())
    return LineScreen()
