"""A process that answers line by line, and is ended with all it started when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType

SAVING_SECONDS = 30.0
"""For a training to save itself when the program is interrupted."""


class Watched:
    """Runs a command in a process group of its own; leaving the context ends the group."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._timer: threading.Timer | None = None
        self.timed_out = False

    def __enter__(self) -> Watched:
        return self

    def allow(self, seconds: float) -> None:
        """End it so many seconds from now, whatever was allowed before."""
        self._stop_timer()
        self._timer = threading.Timer(max(seconds, 0.0), self._time_is_up)
        self._timer.daemon = True
        self._timer.start()

    def lines(self) -> Iterator[str]:
        """Yield what it prints, until it ends."""
        assert self._process.stdout is not None
        yield from self._process.stdout
        self._process.wait()

    @property
    def returncode(self) -> int:
        """What it ended with."""
        return self._process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End what is left of it: with time to save, if this is an interruption."""
        self._stop_timer()
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            until = time.monotonic() + SAVING_SECONDS
            while self._alive() and time.monotonic() < until:
                time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _time_is_up(self) -> None:
        self.timed_out = True
        self._signal(signal.SIGKILL)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _alive(self) -> bool:
        """Tell whether any process of the group is left; the first one is waited for."""
        self._process.poll()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, 0)
            return True
        return False
