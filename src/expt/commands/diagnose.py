"""`task=diagnose`: read an out-of-memory message or a training log, and say what is wrong.

The answer is printed and written to ``diagnosis.json`` in the run's directory.
"""

from __future__ import annotations

import codecs
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from expt.config.settings import RunContext
from expt.errors import ConfigError
from expt.files import write_json
from expt.memory.diagnosis.diagnosis import Diagnosis, diagnose
from expt.memory.diagnosis.log_tables import csv_delimiter

DIAGNOSIS_NAME = "diagnosis.json"
MOST_BYTES = 8 * 1024**2
"""Of a longer file the end is read: that is where memory ran out."""
MOST_JSON_BYTES = 64 * 1024**2
"""Of a longer JSON list or object the end is read as well, of a shorter one all."""
HEAD_BYTES = 64 * 1024
"""In which the first line of a table has to end."""
MOST_GARBLED = 0.05
"""Characters that are no text, as a part of all, from which on a file is taken to be binary."""

_JSON = re.compile(r'\s*(?:\[\s*[\[{]|\{\s*["}])')
"""How a document of JSON begins, and a log (``[2026-01-01 …``, ``[rank0]:``) does not."""
_GARBLED = re.compile("[\x01-\x06\x0e-\x1a\ufffd]")


@dataclass(frozen=True)
class DiagnoseResult:
    """The answer; a diagnosis that was reached is exit code 0, whatever it says."""

    diagnosis: Diagnosis
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> DiagnoseResult:
    """Diagnose the file that `diagnose.log` names.

    Raises:
        ConfigError: it is not set, not a readable file, empty, or not text.

    """
    path = _path(cfg.diagnose.log)
    diagnosis = diagnose(_read(path))
    _print(diagnosis, path)
    target = context.run_dir / DIAGNOSIS_NAME
    write_json(target, {"log": str(path), **diagnosis.as_dict()})
    print(f"\nfiles: {target}")
    return DiagnoseResult(diagnosis)


def _path(log: str | None) -> Path:
    if log is None or not log.strip():
        raise ConfigError(
            "diagnose.log is not set; give the file to read: an error message, a training log, a "
            "CSV of readings or a history.json, as in diagnose.log=train.log"
        )
    path = Path(log).expanduser()
    if path.is_dir():
        raise ConfigError(
            f"diagnose.log={log} is a folder; give a file in it, such as history.json or a log"
        )
    if not path.exists():
        raise ConfigError(f"diagnose.log={log}: there is no such file")
    return path


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(HEAD_BYTES)
            encoding = _encoding(start[:4096])
            head = start.decode(encoding, errors="replace").removeprefix("\ufeff")
            most = MOST_JSON_BYTES if _JSON.match(head) else MOST_BYTES
            file.seek(0)
            if size > most:
                print(f"{path} is long; the last {MOST_BYTES // 1024**2} MiB of it are read")
                file.seek((size - MOST_BYTES) // 2 * 2)  # between two characters of UTF-16
            content = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"diagnose.log={path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise ConfigError(f"diagnose.log={path} is empty; give the log or the error message")
    text = content.decode(encoding, errors="replace").removeprefix("\ufeff")
    first, ends, _ = head.partition("\n")
    if size > most and ends and csv_delimiter(first) is not None:
        text = f"{first}\n{text.partition(chr(10))[2]}"  # a table keeps its head
    if "\0" in text or len(_GARBLED.findall(text)) > MOST_GARBLED * len(text):
        raise ConfigError(
            f"diagnose.log={path} is not text (a checkpoint, a picture, an archive?); give a log, "
            "an error message, a CSV or a history.json in UTF-8 or UTF-16"
        )
    return text


def _encoding(head: bytes) -> str:
    """Return the encoding of a file that begins so; PowerShell's ``>`` writes UTF-16."""
    marks = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    if head[:2] in marks:
        return marks[head[:2]]
    odd, even = head[1::2].count(0), head[::2].count(0)
    if max(odd, even) > 0.8 * (len(head) // 2) and min(odd, even) == 0:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"


def _print(diagnosis: Diagnosis, path: Path) -> None:
    print(f"{path}: {diagnosis.kind}\n\n  {diagnosis.cause}\n")
    print("evidence")
    for line in diagnosis.evidence:
        print(textwrap.fill(line, 96, initial_indent="  - ", subsequent_indent="    "))
    if diagnosis.advice:
        print("what to do, in this order")
    for number, line in enumerate(diagnosis.advice, 1):
        print(textwrap.fill(line, 96, initial_indent=f"  {number}. ", subsequent_indent="     "))
