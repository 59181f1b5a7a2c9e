"""SIGINT and SIGTERM as a flag that the loop reads between two steps.

The step in flight is finished and a checkpoint written; a second signal of the same kind does not
wait for that: it raises `Stopped` where the program is, so that the run is still recorded.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context manager; `received` is the signal's number once one came."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

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
        if self.received == number:
            raise Stopped(number)
        self.received = number


class Stopped(KeyboardInterrupt):
    """A run ended on a signal, saved and recorded; ends a multirun too, exit code 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
