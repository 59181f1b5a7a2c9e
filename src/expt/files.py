"""Writing files so that a reader, or a run after a crash, never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from expt.errors import StorageError

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TEMPORARY = re.compile(r"\..+\.(?:([0-9a-f]{12})-)?(\d+)-\d+\.tmp")
"""Of the writer: the place (see `_place`; earlier versions gave none), the process, the thread."""
_LEFTOVER_SECONDS = 24 * 3600.0
"""Nobody, on another machine either, still writes a temporary file that is as old as this."""


def replace_atomically(path: Path, write: Callable[[Path], None], durable: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place.

    Several processes and threads may do so for one path at once: it is the last one's, whole.

    Args:
        path: the file to make or replace; its folder is made.
        write: called with the temporary path.
        durable: wait until the bytes are on the disk, so that a power cut loses nothing.

    Raises:
        StorageError: the disk refused; what was at `path` before is intact.

    """
    writer = f"{_place()}-{os.getpid()}-{threading.get_ident()}"
    # Of a long name the beginning: a name has 255 bytes at most, and a letter four.
    temporary = path.with_name(f".{path.name[:48]}.{writer}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with contextlib.suppress(OSError):  # an earlier version's, of a process that was killed
            path.with_name(f".{path.name}.tmp").unlink()
        write(temporary)
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(
            f"cannot write {path}: {reason}. What was saved before is intact; "
            "free some space or choose another folder with hydra.run.dir=FOLDER"
        ) from error
    finally:
        # Gone already if all went well; left behind by any error or a second Ctrl-C.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@cache  # once for a folder: some hold thousands of files
def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    old = time.time() - _LEFTOVER_SECONDS
    with os.scandir(folder) as entries:
        for entry in entries:
            if found := _TEMPORARY.fullmatch(entry.name):
                ended = found[1] == _place() and not _runs(int(found[2]))
                with contextlib.suppress(OSError):  # put in its place meanwhile, or another's
                    if ended or entry.stat().st_mtime < old:
                        Path(entry).unlink()


@cache
def _place() -> str:
    """Return where the number of a process is one: a machine since it was started, a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        told = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        told = platform.node()
    return sha256(told.encode()).hexdigest()[:12]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Put the new name itself on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, durable: bool = True, private: bool = False) -> None:
    """Write `text` as UTF-8 atomically; a `private` file is for its owner only, mode 0600.

    What is no text, as in the name of a file in another encoding, becomes an escape (`printable`).
    """
    replace_atomically(path, lambda temporary: _write(temporary, text, private), durable)


def write_json(path: Path, value: Any, durable: bool = True, private: bool = False) -> None:
    """Write `value` as JSON atomically; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"
    write_text(path, text, durable, private)


def make_private(*paths: Path) -> None:
    """Take files, and those in folders, away from everybody but their owner, where they are."""
    for path in paths:
        for file in path.iterdir() if path.is_dir() else (path,):
            with contextlib.suppress(OSError):
                file.chmod(0o600)


def printable(text: str) -> str:
    r"""Return text that UTF-8 can say; what it cannot, in a file's name, is as ``\udcXX`` in it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write(path: Path, text: str, private: bool) -> None:
    if private:  # before there is anything in it
        path.touch(mode=0o600)
        path.chmod(0o600)
    path.write_text(printable(text), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def remove_empty_date(folder: Path) -> None:
    """Remove a folder named after a day, as Hydra makes them; any other may be the user's."""
    if _DATE.fullmatch(folder.name):
        with contextlib.suppress(OSError):
            folder.rmdir()
