"""Locks between processes, of which a process that is killed leaves nothing behind (flock).

`Lock` is any file's; `run_lock` keeps a run's directory for one process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from expt.errors import ConfigError, StorageError

RUN_LOCK = "run.lock"
"""In a run's directory while it runs; one that a killed run left is open to the next."""


class Lock:
    """Exclusive use of a file's name between processes, and between threads of one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, wait: bool = False, required: bool = False) -> bool:
        """Take the lock; False if another holder has it and we do not wait.

        Raises:
            StorageError: the file system has no locks, and one is `required`; else it is done
                without.

        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            if required:
                os.close(descriptor)
                raise StorageError(
                    f"{self._path.parent} is on a file system without locks ({error.strerror}), "
                    "and several workers would not see each other; give a folder elsewhere as "
                    "hydra.sweep.dir=FOLDER"
                ) from error
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give the lock back; also done by the end of the process, however it ends."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def is_current(self) -> bool:
        """Whether the file that is held still has the name; its holder may have removed it."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def write(self, text: str) -> None:
        """Replace what the file says about its holder."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep a run's directory for this process; of several that train as one, the first has it.

    Raises:
        ConfigError: another process runs there.

    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = run_dir / RUN_LOCK
    lock = Lock(path)
    while True:
        if not lock.acquire():
            raise ConfigError(
                f"a run is going on in {run_dir}{_holder(path)}; wait until it has ended, or "
                "choose another folder with hydra.run.dir=FOLDER"
            )
        if lock.is_current:
            break
        lock.release()
    try:
        lock.write(f"{os.getpid()}\n")
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    try:
        return f" (process {int(path.read_text())})"
    except (OSError, ValueError):
        return ""
