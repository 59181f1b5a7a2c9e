"""A data file on disk: whether it is there, and how a library's complaint about it is told.

Every reader of a format works inside these two, so that whatever is wrong with a file ends as
one `DataError` which names the path, what was found, what was expected and what to try.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from expt.errors import DataError

_SIGNATURES = (
    (b"PK", "a zip archive (.npz)"),
    (b"\x89HDF", "an HDF5 file (.h5)"),
    (b"PAR1", "a parquet file (.parquet)"),
    (b"\x93NUMPY", "a single array (.npy)"),
    (b"\x80", "a pickle (.pkl)"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch it with `git lfs pull`"),
    (b"<", "a web page, perhaps from a failed download"),
)
_ADVICE = {
    ".gz": "; unpack it first, gunzip FILE",
    ".zip": "; unpack it first, unzip FILE",
    ".tsv": "; write commas between the columns, and call it .csv",
    ".txt": "; of a table write commas between the columns, and call it .csv",
    ".xlsx": "; save the sheet as csv",
}
"""What to do with a file of another suffix."""


def checked_suffix(path: Path, known: Collection[str]) -> str:
    """Return the file's suffix in lower case, once it is one of `known` and the file is readable.

    Raises `DataError` when there is no such file, or it is a folder, empty, unreadable or unknown.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"is a directory; expected a file, one of {_listed(known)}")
        if path.suffix.lower() not in known:
            advice = _ADVICE.get(path.suffix.lower(), "")
            raise DataError(
                f"unknown suffix {path.suffix!r}; expected one of {_listed(known)}{advice}"
            )
        if not stat.S_ISREG(status.st_mode):
            raise DataError("is not a regular file; expected a file on disk")
        if status.st_size == 0:
            raise DataError("is empty (0 bytes); copy or download it again")
        with path.open("rb"):
            pass
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"no such file; check the path (a relative one starts at {Path.cwd()})"
        ) from None
    except PermissionError as error:
        raise DataError(
            "permission denied; make it readable, `chmod +r`, and its folders open, `chmod +x`"
        ) from error
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be opened: {reason}; check the path") from error
    return path.suffix.lower()


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Put the path in front of the message of any `DataError` raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@contextmanager
def translated(path: Path, expected: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library raises over a damaged file into a `DataError`; wrap little else."""
    try:
        yield
    except DataError:
        raise
    except BlockingIOError as error:
        raise DataError(
            "is open for writing in another program, which has locked it: close it there, or wait "
            "until it is written"
        ) from error
    except errors as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"cannot be read as {expected} ({type(error).__name__}: {reason}); "
            f"the file begins like {_begins_like(path)}. "
            "It is damaged, cut short or of another format: copy or download it again"
        ) from error


def _begins_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(24)
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    return f"{head[:12]!r}"


def _listed(known: Collection[str]) -> str:
    return ", ".join(sorted(known))
