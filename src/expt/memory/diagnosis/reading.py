"""Memory readings and out-of-memory messages in a file: logs of any program, our own records, CSV.

A line of a log counts when it names a step and an amount of memory: ``step 100: 18.2 GB``,
``[100/1000] mem 18.2G reserved 20.1G``, ``iter 5 ... mem_usage:cuda:0 8.9GB``. Words next to an
amount say what it is. Tables are CSV with a column of steps or times and columns of memory whose
names or values give the unit; records are JSON, or JSON lines, with the names of ``history.json``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from expt.memory.diagnosis.oom import OomReport, classify_oom
from expt.memory.diagnosis.quantities import NUMBER, UNIT, quantities, to_bytes
from expt.memory.diagnosis.reading_tables import read_table
from expt.memory.diagnosis.reading_words import AFTER, ANYWHERE, BEFORE, as_reading, label
from expt.memory.diagnosis.trend import Reading

LONGEST_LINE = 2000
"""Characters of a line that are looked at."""
_STEP = re.compile(
    r"\b(?:global[_ ]?|train(?:ing)?[_ ]?)?(?:steps?|iter(?:ation)?s?|it|batch)\b\s*[\"']?\s*"
    r"[:=#]?\s*\[?\s*(?P<step>\d[\d,]*)(?!\.?\d*\s*(?:[KMGT]i?B|s\b))",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"\[\s*(?P<step>\d+)\s*/\s*\d+\s*\]")
_UNIT = re.compile(r"[KMGTkmgt]i?[Bb]?\b|bytes", re.ASCII)
_EPOCH = re.compile(r"\bepochs?\b\s*[:=#]?\s*\[?\s*(?P<step>\d+)", re.IGNORECASE)
_OOM_WORD = re.compile(
    r"(?<!no )(?<!0 )\b(?:OOM\b|(?:CUDA )?[Oo]ut of memory)(?![-_ ](?:events|er))"
)
_UNIT_IN_NAME = re.compile(
    r"(?P<name>[a-z][\w .]*?)[ _]?[(\[_]?(?P<unit>[kmgt]i?b|bytes)[)\]]?\s*[:=]\s*"
    r"(?P<number>\d[\d,]*\.?\d*)(?![\d,.]*\s*[KMGT]i?B)",
    re.IGNORECASE,
)
_NAMED_UNIT = re.compile(r"[_(\[ ](?:[kmgt]i?b|bytes)[)\]]?\s*[:=]", re.IGNORECASE)
_SHARE = re.compile(
    rf"(?<![\w./])(?P<part>{NUMBER})(?P<slash>\s*/\s*)(?={NUMBER}\s*(?P<unit>{UNIT}))"
)
_OF = re.compile(rf"(?P<unit>{UNIT})\s*(?:\bout of\b|\bof\b|/)\s*(?={NUMBER}\s*{UNIT})")


@dataclass(frozen=True)
class LogContent:
    """What a file says about memory."""

    readings: tuple[Reading, ...]
    oom: OomReport | None
    oom_step: float | None  # where memory ran out, if the file says at which step
    ran_out: bool  # the file says that memory ran out, in whatever words
    form: str  # "log", "csv" or "json"


def read_log(text: str) -> LogContent:
    """Read a log, a CSV table or JSON records, whichever it is; finding nothing is no error."""
    readings, form = read_table(text)
    if readings:
        report = classify_oom(text)
        return LogContent(_in_order(readings), report, None, report is not None, form)
    return _read_lines(text)


def _read_lines(text: str) -> LogContent:
    readings: list[Reading] = []
    epochs: list[Reading] = []
    step: float | None = None
    ran_out_at: float | None = None
    word = False
    for line in text.splitlines():
        line = line[:LONGEST_LINE]
        named = _STEP.search(line) or _BRACKETED.search(line)
        step = _count(named) if named else step
        if _OOM_WORD.search(line) and (classify_oom(line) is not None or (named and not word)):
            word, ran_out_at = True, step if ran_out_at is None else ran_out_at
            continue  # its amounts are those of the message
        if _UNIT.search(line) is None:
            continue
        epoch = None if named else _EPOCH.search(line)
        if named or epoch:
            values = _line_values(line)
            if {"allocated_bytes", "peak_bytes"} & values.keys():
                into, found = (readings, named) if named else (epochs, epoch)
                into.append(as_reading(_count(found), values))
    report = classify_oom(text)
    chosen = _in_order(readings if len(readings) >= len(epochs) else epochs)
    if report is None and not word:
        ran_out_at = None
    return LogContent(chosen, report, ran_out_at, word or report is not None, "log")


def _count(found: re.Match[str] | None) -> float:
    assert found is not None
    return float(found["step"].replace(",", ""))


def _line_values(line: str) -> dict[str, int]:
    """Return the amounts of a line by what they are; the largest of several of a kind."""
    found: dict[str, int] = {}
    named_units = _UNIT_IN_NAME.finditer(line) if _NAMED_UNIT.search(line) else ()
    for one in named_units:
        name = label(ANYWHERE, one["name"])
        if name not in (None, "ignored"):
            found[str(name)] = max(found.get(str(name), 0), to_bytes(one["number"], one["unit"]))
    line = _SHARE.sub(r"\g<part> \g<unit>, total ", line)  # 18.2/24 GB
    line = _OF.sub(r"\g<unit>, total ", line)  # 18.2 GB of 24 GB, 18.2GB/24GB
    end = 0
    unnamed = []
    for amount in quantities(line):
        before = re.split(r"[,;|]", line[end : amount.start])[-1]
        end = amount.end
        name = label(BEFORE, before)
        if name is None and (name := label(AFTER, line[end:])) is not None:
            end += len(line[end:]) - len(re.sub(r"^\W*(?:(?:is|already) )?\w+", "", line[end:]))
        name = name or label(ANYWHERE, before)
        if name is None:
            unnamed.append(amount.count_bytes)
        elif name != "ignored":
            found[name] = max(found.get(name, 0), amount.count_bytes)
    if unnamed and not {"allocated_bytes", "peak_bytes"} & found.keys():
        found["allocated_bytes"] = unnamed[0]
    return found


def _in_order(readings: Sequence[Reading]) -> tuple[Reading, ...]:
    """Count on where steps begin again, and keep the highest reading of several ranks."""
    offset = previous = highest = 0.0
    by_step: dict[float, Reading] = {}
    for reading in readings:
        if reading.step < previous / 2:  # a new epoch or a resumed run, not a rank behind
            offset = highest
        previous = reading.step
        at = reading.step + offset
        highest = max(highest, at)
        known = by_step.get(at)
        if known is None or reading.allocated_bytes > known.allocated_bytes:
            by_step[at] = replace(reading, step=at)
    return tuple(by_step[at] for at in sorted(by_step))
