"""Memory readings and out-of-memory messages in a file: logs of any program, our own records, CSV.

A line of a log counts when it names a step and an amount of memory: ``step 100: 18.2 GB``,
``[100/1000] mem 18.2G reserved 20.1G``, ``iter 5 ... mem_usage:cuda:0 8.9GB``. Words next to an
amount say what it is. Tables are CSV with a column of steps or times and columns of memory whose
names or values give the unit; records are JSON, or JSON lines, with the names of ``history.json``.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expt.memory.oom import OomReport, classify_oom
from expt.memory.quantities import FACTORS, NUMBER, UNIT, quantities, to_bytes
from expt.memory.trend import Reading

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
_LABELS = (  # the first that stands next to an amount says what it is
    ("ignored", r"checkpoint|saved?|file|data ?set|download|params?|parameters|weights|disk|batch"),
    ("total_bytes", r"total|capacity|limit|budget|max allowed"),
    ("free_bytes", r"free|available|avail"),
    ("peak_bytes", r"peak|max(?:imum)?(?:_\w+)?|high[- ]water"),
    ("reserved_bytes", r"\w*reserved\w*|cached?|pool"),
    ("other_bytes", r"others?(?: process\w*)?"),
    ("allocated_bytes", r"\w*alloc\w*|\w*mem\w*|used|usage|gpu|vram|rss|current|cuda(?::\d+)?"),
)
_BEFORE = [(name, re.compile(rf"(?:^|[\W_])(?:{words})[\W_]*$", re.I)) for name, words in _LABELS]
_ANYWHERE = [
    (name, re.compile(rf"(?:^|[\W_])(?:{words})(?![a-z])", re.I)) for name, words in _LABELS
]
_AFTER = [
    (name, re.compile(rf"^\s?(?:is |already )?(?:{words})\b", re.I)) for name, words in _LABELS
]
_UNIT_IN_NAME = re.compile(
    r"(?P<name>[a-z][\w .]*?)[ _]?[(\[_]?(?P<unit>[kmgt]i?b|bytes)[)\]]?\s*[:=]\s*"
    r"(?P<number>\d[\d,]*\.?\d*)(?![\d,.]*\s*[KMGT]i?B)",
    re.IGNORECASE,
)
_NAMED_UNIT = re.compile(r"[_(\[ ](?:[kmgt]i?b|bytes)[)\]]?\s*[:=]", re.IGNORECASE)
_COLUMN_UNIT = re.compile(r"[ _.\[(]+(?P<unit>[kmgt]i?b|bytes|b)[\])]?$", re.IGNORECASE)
_SHARE = re.compile(
    rf"(?<![\w./])(?P<part>{NUMBER})(?P<slash>\s*/\s*)(?={NUMBER}\s*(?P<unit>{UNIT}))"
)
_OF = re.compile(rf"(?P<unit>{UNIT})\s*(?:\bout of\b|\bof\b|/)\s*(?={NUMBER}\s*{UNIT})")
_KNOWN_NAMES = {  # of our own records
    "allocated_bytes": "allocated_bytes",
    "reserved_bytes": "reserved_bytes",
    "peak_allocated_bytes": "peak_bytes",
    "peak_reserved_bytes": "ignored",
    "process_peak_bytes": "process_peak_bytes",
}
_DEVICE_NAMES = ("index", "gpu", "device", "rank")
_STEP_NAMES = ("step", "global_step", "iteration", "iter", "batch", "seconds", "time")


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
    rows, form = _json_rows(text), "json"
    if not rows:
        rows, form = _csv_rows(text), "csv"
    readings = [
        found for at, row in enumerate(_of_one_device(rows)) if (found := _from_row(at, row))
    ]
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
                into.append(_reading(_count(found), values))
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
        name = _label(_ANYWHERE, one["name"])
        if name not in (None, "ignored"):
            found[str(name)] = max(found.get(str(name), 0), to_bytes(one["number"], one["unit"]))
    line = _SHARE.sub(r"\g<part> \g<unit>, total ", line)  # 18.2/24 GB
    line = _OF.sub(r"\g<unit>, total ", line)  # 18.2 GB of 24 GB, 18.2GB/24GB
    end = 0
    unnamed = []
    for amount in quantities(line):
        before = re.split(r"[,;|]", line[end : amount.start])[-1]
        end = amount.end
        name = _label(_BEFORE, before)
        if name is None and (name := _label(_AFTER, line[end:])) is not None:
            end += len(line[end:]) - len(re.sub(r"^\W*(?:(?:is|already) )?\w+", "", line[end:]))
        name = name or _label(_ANYWHERE, before)
        if name is None:
            unnamed.append(amount.count_bytes)
        elif name != "ignored":
            found[name] = max(found.get(name, 0), amount.count_bytes)
    if unnamed and not {"allocated_bytes", "peak_bytes"} & found.keys():
        found["allocated_bytes"] = unnamed[0]
    return found


def _label(patterns: Iterable[tuple[str, re.Pattern[str]]], text: str) -> str | None:
    return next((name for name, pattern in patterns if pattern.search(text)), None)


def _reading(step: float, values: Mapping[str, int]) -> Reading:
    allocated = values.get("allocated_bytes")
    peak = values.get("peak_bytes")
    reading = Reading(step, allocated if allocated is not None else values["peak_bytes"])
    return replace(
        reading,
        reserved_bytes=values.get("reserved_bytes"),
        other_bytes=values.get("other_bytes"),
        peak_bytes=peak if allocated is not None else None,
        total_bytes=values.get("total_bytes"),
        high_water=allocated is None,
    )


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


def _json_rows(text: str) -> list[Mapping[str, Any]]:
    """Return the objects of a JSON list, of the first list in an object, or of JSON lines."""
    if not text.lstrip().startswith(("[", "{")):
        return []
    try:
        value = json.loads(text)
    except ValueError:
        lines = [line for line in text.splitlines() if line.startswith("{")]
        value = [row for line in lines if (row := _object(line)) is not None]
    if isinstance(value, dict):
        value = next((part for part in value.values() if isinstance(part, list)), [])
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    # The journal of a run keeps its figures one level down.
    inner = ("metrics", "values")
    return [
        {**row, **next((row[name] for name in inner if isinstance(row.get(name), dict)), {})}
        for row in rows
    ]


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _csv_rows(text: str) -> list[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or "," not in lines[0] or re.search(r"\d", lines[0].split(",")[0]):
        return []
    return [row for row in csv.DictReader(lines, skipinitialspace=True) if None not in row]


def _of_one_device(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the fullest device, where a table has several."""
    column = next((name for name in _DEVICE_NAMES if rows and name in rows[0]), None)
    if column is None or len({row.get(column) for row in rows}) < 2:
        return rows
    fullest = max(
        rows, key=lambda row: found.allocated_bytes if (found := _from_row(0, row)) else 0
    )
    return [row for row in rows if row.get(column) == fullest[column]]


def _from_row(number: int, row: Mapping[str, Any]) -> Reading | None:
    """Return the reading in a record, which may be numbered by its row, or None if it has none."""
    values: dict[str, int] = {}
    step = None
    for key, value in row.items():
        name = str(key).strip().lower().removeprefix("memory/")
        if step is None and name in _STEP_NAMES:
            step = _number(value)
        unit = _COLUMN_UNIT.search(name)
        count = _amount(value, unit["unit"] if unit else None)
        what = _KNOWN_NAMES.get(name) or _label(_ANYWHERE, name)
        if what not in (None, "ignored") and count is not None:
            values[str(what)] = max(values.get(str(what), 0), count)
    process = values.pop("process_peak_bytes", None)
    if process is not None and "allocated_bytes" not in values:
        values = {"peak_bytes": process}  # a process and its tensors are never mixed
    if not {"allocated_bytes", "peak_bytes"} & values.keys():
        return None
    return _reading(float(number) if step is None else step, values)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _amount(value: Any, unit: str | None) -> int | None:
    """Return the bytes of a cell, by its own unit or its column's."""
    number = _number(value)
    if number is not None and unit is not None and unit.lower() in FACTORS and number >= 0:
        return to_bytes(repr(number), unit)
    own = next(quantities(value), None) if isinstance(value, str) else None
    return own.count_bytes if own is not None else None
