"""SIGINT and SIGTERM as a flag that the loop reads between two steps.

The step in flight is finished and a checkpoint written; a second signal of the same kind does not
wait for that: it raises `Stopped` where the program is, so that the run is still recorded. A
SIGTERM within `SAME_SECONDS` of another is the same one: a scheduler sends it to every process of a
job, and those that start others pass it on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.util import register_after_fork
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 30.0
"""Within so long after a SIGTERM another one is the same, sent on by another process. It is handled
when the call that computes at that moment returns, which may take seconds."""


class Interruption:
    """Context manager; `received` is the signal's number once one came."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._since = 0.0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def signalled(self) -> bool:
        """Tell whether a signal came."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == number:
            if number == signal.SIGTERM and now - self._since < SAME_SECONDS:
                return
            raise Stopped(number)
        self.received, self._since = number, now


class Stopped(KeyboardInterrupt):
    """A run ended on a signal, saved and recorded; ends a multirun too, exit code 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals back, from this thread and for good from a process that is started in it.

    So a server that forks others outlives a signal to the whole group, which would leave those
    without a way to say how they end. What is to hear them again calls `hear_signals`.
    """
    resource_tracker.ensure_running()  # when it starts, it lets them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_signals() -> None:
    """Let through what `signals_held` held back from the process that started this one."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class _Forked:
    """Lets SIGTERM through in what a held server forks for others in this program.

    They end it with SIGTERM. What is ours is held until it calls `hear_signals`.
    """

    ours = False

    def hear(self) -> None:
        if not self.ours:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


_FORKED = _Forked()
if hasattr(signal, "pthread_sigmask"):
    register_after_fork(_FORKED, _Forked.hear)  # once what it is to do has been unpickled


def stay_held() -> None:
    """Leave this process, which is just being forked, deaf until it calls `hear_signals`."""
    _FORKED.ours = True
