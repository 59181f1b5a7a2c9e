"""The cells of a CSV file, whatever its encoding, without the columns that trailing commas make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from expt.errors import DataError
from expt.jobs.traffic.source import translated

if TYPE_CHECKING:
    import pandas as pd

_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""What a file begins with that is not in UTF-8 and says so."""


@contextmanager
def opened_csv(path: Path) -> Iterator[TextIO]:
    """Open the file as text, and say of what pandas cannot read what is wrong with it.

    Raises `DataError` when the file is damaged, its text is in an encoding that cannot be told, or
    its rows differ in length.
    """
    import pandas as pd

    with translated(path, "CSV", OSError, ValueError):
        try:
            with path.open(encoding=_encoding(path)) as file:
                yield file
        except UnicodeDecodeError as error:
            _refuse_encoding(path, error)
            raise
        except pd.errors.ParserError as error:
            if "Expected" not in str(error):
                raise
            raise DataError(
                f"cannot be read as CSV (ParserError: {str(error).strip()}); expected as many "
                "cells in every row: look at that line for a comma too many, or for a decimal comma"
            ) from error


def blank_lines(file: TextIO) -> int:
    """Return how many lines without anything the file begins with, and go back to its start."""
    count = next((number for number, line in enumerate(file) if line.strip("\ufeff \t\n")), 0)
    file.seek(0)
    return count


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(256)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros = head[offset::2]
        if len(zeros) > 4 and not any(zeros) and all(head[1 - offset :: 2]):
            return encoding
    return "utf-8-sig"


def _refuse_encoding(path: Path, error: UnicodeDecodeError) -> None:
    """Refuse text in one of the encodings of 256 characters, which nothing in the file tells."""
    number, line, at = 0, b"", None
    with path.open("rb") as file:
        while at is None and (line := file.readline()):
            number += 1
            at = _first_wrong(line)
    if at is None or any(byte < 32 and byte not in b"\t\r\n\f" for byte in line):
        return  # no text at all
    word = line[max(0, at - 12) : at + 12].decode("latin-1").strip()
    raise DataError(
        f"cannot be read as CSV (UnicodeDecodeError): it is in another encoding than UTF-8, with "
        f"the byte 0x{line[at]:02x} in line {number}. In Latin-1 (ISO 8859-1) it would "
        f"read …{word}…; if that is right, write it in UTF-8: iconv -f latin1 -t utf-8 "
        f"'{path.name}' > utf8.csv. Windows-1252, GBK and Shift-JIS are other common ones"
    ) from error


def _first_wrong(line: bytes) -> int | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def without_empty_end(cells: pd.DataFrame, keep: int) -> pd.DataFrame:
    """Drop the last columns in which no row has anything, as far as `keep` columns."""
    while cells.shape[1] > keep and _is_empty(cells.iloc[:, -1]):
        cells = cells.iloc[:, :-1]
    return cells


def _is_empty(column: pd.Series[Any]) -> bool:
    return bool((column.isna() | (column.astype(str).str.strip() == "")).all())
