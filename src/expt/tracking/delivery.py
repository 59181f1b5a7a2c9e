"""How records reach a tracking server: one thread for a run's journal, one for many journals.

`Writer` sends the journal of the run that this process trains, while it trains. `Deliveries` sends
the journals of runs of other processes, one after the other, over one open store; a journal that
somebody else is sending, or whose parent run is not there yet, waits for its turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from expt.tracking.sender import NotReadyError, Sender, Target
from expt.tracking.store import MlflowStore, reason
from expt.uri import without_password

_logger = logging.getLogger(__name__)

REPLAY_COMMAND = "python -m expt task=replay"
_PAUSE_SECONDS = 0.2
_BACKOFF_SECONDS = (0.5, 30.0)


class Deliveries(threading.Thread):
    """Sends journals in the background; nothing that fails in here gets out.

    Args:
        target: where all of them go, also those that went elsewhere before.
        open_store: opens it; for tests.

    """

    def __init__(
        self, target: Target, open_store: Callable[[str], MlflowStore] = MlflowStore
    ) -> None:
        super().__init__(name="expt-deliveries", daemon=True)
        self._target = target
        self._open_store = open_store
        self._store: MlflowStore | None = None
        self._changed = threading.Condition()
        self._waiting: dict[Path, None] = {}
        self._closed = False
        self._busy = False
        self._failures = 0
        self._backoff = _BACKOFF_SECONDS[0]

    def add(self, directory: Path) -> None:
        """Have the journal in `directory` sent; a later call sends what was added since."""
        with self._changed:
            self._waiting.pop(directory, None)
            self._waiting[directory] = None
            self._changed.notify_all()
        if not self.is_alive() and not self._closed:
            self.start()

    def flush(self, seconds: float) -> bool:
        """Wait until all is sent, at most so long, and not for a store that does not answer."""
        with self._changed:
            failures = self._failures
            self._changed.wait_for(
                lambda: not (self._waiting or self._busy) or self._failures > failures + 1, seconds
            )
            return not (self._waiting or self._busy)

    def close(self, seconds: float) -> bool:
        """Send what is left, bounded in time, and end; return whether all of it was sent."""
        arrived = self.flush(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self.is_alive():
            self.join(timeout=1.0)
        if not arrived:
            _logger.warning(
                "some records have not reached %s; they are kept beside the runs. When it "
                "answers: %s",
                without_password(self._target.uri),
                REPLAY_COMMAND,
            )
        return arrived

    def run(self) -> None:
        """Send one journal after another."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                directory = next(iter(self._waiting))
                del self._waiting[directory]
                self._busy = True
            pause = self._send(directory)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            if pause:
                time.sleep(pause)

    def _send(self, directory: Path) -> float:
        """Send one journal; return how long to rest before the next."""
        try:
            if self._store is None:
                self._store = self._open_store(self._target.uri)
            sender = Sender(directory, self._target, self._store)
            try:
                while sender.send_group():
                    pass
            finally:
                sender.close()
        except NotReadyError:
            self._again(directory)
            return _PAUSE_SECONDS
        except Exception as error:
            if threading.main_thread().is_alive():
                _logger.info("%s is sent later: %s", directory, reason(error))
            self._failures += 1
            self._again(directory)
            pause = self._backoff
            self._backoff = min(2 * pause, _BACKOFF_SECONDS[1])
            return pause
        self._backoff = _BACKOFF_SECONDS[0]
        return 0.0

    def _again(self, directory: Path) -> None:
        with self._changed:
            self._waiting.setdefault(directory, None)


_SEND_INTERVAL_SECONDS = 5.0  # a call costs ~20 ms of the interpreter that also trains
_POLL_SECONDS = 0.2


class Writer(threading.Thread):
    """Sends in the background until it is closed; nothing that fails in here gets out."""

    def __init__(self, sender: Sender, journal: Path) -> None:
        super().__init__(name="expt-tracking", daemon=True)
        self._sender = sender
        self._journal = journal
        self._changed = threading.Condition()
        self._recorded = 0  # bytes appended
        self._urgent = True  # somebody waits, or the run is to be opened
        self._closed = False
        self._idle = False
        self._failures = 0
        self._silent_since: float | None = None
        self._backoff = _BACKOFF_SECONDS[0]

    def notify(self, recorded: int) -> None:
        """Tell that the journal has grown to this many bytes."""
        with self._changed:
            self._recorded = recorded
            if self._idle:
                self._changed.notify_all()

    def flush(self, end: int, seconds: float) -> bool:
        """Wait until the store has so many bytes of the journal, or refused once too often."""
        with self._changed:
            allowed = self._failures + (2 if self._silent_since is None else 1)
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._sender.position >= end or self._failures >= allowed, seconds
            )
            return self._sender.position >= end

    def close(self) -> None:
        """Ask the thread to end, and wait a moment for it; it may be inside a long request."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.join(timeout=1.0)

    def run(self) -> None:
        """Send what there is, then sleep until there is more."""
        try:
            while not self._closed:
                pause = self._attempt()
                with self._changed:
                    self._wait(lambda: self._urgent, pause)
                    self._idle = True
                    self._wait(lambda: self._urgent or self._recorded > self._sender.position, None)
                    self._idle = False
        finally:
            self._sender.close()

    def _wait(self, ready: Callable[[], bool], seconds: float | None) -> None:
        self._changed.wait_for(lambda: self._closed or ready(), seconds)

    def _attempt(self) -> float:
        """Send until nothing is left or something fails; return how long to rest."""
        self._urgent = False
        try:
            while not self._closed and self._sender.send_group():
                self._answered()
        except NotReadyError:
            return _POLL_SECONDS
        except Exception as error:
            if threading.main_thread().is_alive():  # else modules are being torn down
                self._did_not_answer(error)
            return self._next_backoff()
        return _SEND_INTERVAL_SECONDS

    def _answered(self) -> None:
        if self._silent_since is not None:
            _logger.info(
                "tracking server %s is back after %.0f s",
                self._shown_uri(),
                time.monotonic() - self._silent_since,
            )
            self._silent_since = None
        self._backoff = _BACKOFF_SECONDS[0]
        with self._changed:
            self._changed.notify_all()

    def _did_not_answer(self, error: Exception) -> None:
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            _logger.warning(
                "tracking server %s does not answer (%s); records are kept in %s and sent later",
                self._shown_uri(),
                reason(error),
                self._journal,
            )
        with self._changed:
            self._failures += 1
            self._changed.notify_all()

    def _next_backoff(self) -> float:
        pause = self._backoff
        self._backoff = min(2 * pause, _BACKOFF_SECONDS[1])
        return pause

    def _shown_uri(self) -> str:
        return without_password(self._sender.state.uri) if self._sender.state else "(unknown)"
