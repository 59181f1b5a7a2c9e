"""Memory readings in a table: CSV, a JSON list, or JSON lines.

A column's name, or its values, say what it holds and in which unit; of a table with several
devices the fullest is read.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from expt.memory.diagnosis.quantities import FACTORS, quantities, to_bytes
from expt.memory.diagnosis.reading_words import ANYWHERE, as_reading, label
from expt.memory.diagnosis.trend import Reading

_COLUMN_UNIT = re.compile(r"[ _.\[(]+(?P<unit>[kmgt]i?b|bytes|b)[\])]?$", re.IGNORECASE)
_KNOWN_NAMES = {  # of our own records
    "allocated_bytes": "allocated_bytes",
    "reserved_bytes": "reserved_bytes",
    "peak_allocated_bytes": "peak_bytes",
    "peak_reserved_bytes": "ignored",
    "process_peak_bytes": "process_peak_bytes",
}
_DEVICE_NAMES = ("index", "gpu", "device", "rank")
_STEP_NAMES = ("step", "global_step", "iteration", "iter", "batch", "seconds", "time")


def read_table(text: str) -> tuple[list[Reading], str]:
    """Return the readings of a table, and whether it is "json" or "csv"; none if it is no table."""
    rows, form = _json_rows(text), "json"
    if not rows:
        rows, form = _csv_rows(text), "csv"
    numbered = enumerate(_of_one_device(rows))
    return [found for at, row in numbered if (found := _from_row(at, row))], form


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
        what = _KNOWN_NAMES.get(name) or label(ANYWHERE, name)
        if what not in (None, "ignored") and count is not None:
            values[str(what)] = max(values.get(str(what), 0), count)
    process = values.pop("process_peak_bytes", None)
    if process is not None and "allocated_bytes" not in values:
        values = {"peak_bytes": process}  # a process and its tensors are never mixed
    if not {"allocated_bytes", "peak_bytes"} & values.keys():
        return None
    return as_reading(float(number) if step is None else step, values)


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
