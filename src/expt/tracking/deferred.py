"""Records for runs of other processes: written here, sent one after the other by one thread.

`DeferredTracker` writes a run's journal and sends nothing. `Deliveries` sends the journals of
many runs in the background, over one open store; a journal that somebody else is sending, or
whose parent run is not there yet, waits for its turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from expt.tracking.mlflow import REPLAY_COMMAND, MlflowTracker
from expt.tracking.sender import NotReadyError, Sender
from expt.tracking.store import MlflowStore, reason
from expt.tracking.uri import absolute_uri, without_password

_logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.2
_BACKOFF_SECONDS = (0.5, 30.0)


class DeferredTracker(MlflowTracker):
    """A `Tracker` whose records stay in the journal until `Deliveries` or a replay sends them."""

    def _deliver(self) -> None:
        """Send nothing."""


class Deliveries(threading.Thread):
    """Sends journals in the background; nothing that fails in here gets out.

    Args:
        uri: of the store that all of them go to.
        open_store: opens it; for tests.

    """

    def __init__(self, uri: str, open_store: Callable[[str], MlflowStore] = MlflowStore) -> None:
        super().__init__(name="expt-deliveries", daemon=True)
        self._uri = absolute_uri(uri)
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
                without_password(self._uri),
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
                self._store = self._open_store(self._uri)
            sender = Sender(directory, store=self._store)
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
