"""Memory readings in tables: CSV, a JSON list, JSON lines, and tables with a head inside a log.

The name of a column, or its values, say what it holds and in which unit. Each device of a table,
whether it is a column of its own or named in one, is a series of its own.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from expt.memory.diagnosis.amounts import Amount, cell_amounts
from expt.memory.diagnosis.labels import describe, name_label

Row = tuple[float, list[Amount]]
"""A step, and the amounts of memory at it."""
DEVICE_NAMES = ("index", "gpu", "device", "rank", "gpu_id", "device_id", "local_rank")
_TIMES = ("seconds", "time")
STEP_NAMES = ("step", "global_step", "num_updates", "iteration", "iter", "batch", "epoch", *_TIMES)
"""Columns that say when, the finest first; a path such as ``train/step`` ends in one of them."""
_WRAPPERS = ("metrics", "values")
"""Names under which the journal of a run and other records keep their figures, one level down."""


def read_table(text: str) -> tuple[list[Row], str]:
    """Return the rows of a table, and whether it is "json" or "csv"; none if it is no table."""
    rows, form = _json_rows(text), "json"
    if not rows:
        rows, form = _csv_rows(text), "csv"
    numbers: Counter[str] = Counter()
    counted = EpochSteps()
    found = []
    for row in rows:
        device, column = _device(row)
        amounts = _row_amounts(row, device, column)
        if amounts:
            step, epoch = _step(row), _column(row, "epoch")
            if step is not None and epoch is not None:
                step = counted.on(step, int(epoch))
            found.append((float(numbers[device]) if step is None else step, amounts))
            numbers[device] += 1
    return found, form


def _json_rows(text: str) -> list[Mapping[str, Any]]:
    """Return the objects of a JSON list, of the first list in an object, or of JSON lines."""
    if not text.lstrip().startswith(("[", "{")):
        return []
    try:
        value = json.loads(text)
    except ValueError:
        lines = [line for line in text.splitlines() if line.lstrip().startswith("{")]
        value = [row for line in lines if (row := _object(line)) is not None]
    if isinstance(value, dict):
        value = _rows_of(value)
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return [dict(_flat(row)) for row in rows]


def _rows_of(value: dict[str, Any]) -> list[Any]:
    """Return the rows of an object: its first list of records, its lists as columns, or itself."""
    lists = {key: part for key, part in value.items() if isinstance(part, list)}
    for part in lists.values():
        if part and isinstance(part[0], dict):
            return part
    if len(lists) < 2:
        return [value]
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=False)]


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line.rstrip().rstrip("],"))  # a list may have a line for each record
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a record and of those inside it, as ``gpu.memory_mb``."""
    for key, value in row.items():
        name = prefix if not prefix and key in _WRAPPERS else f"{prefix}{key}."
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict) and len(inner) <= 64 and name.count(".") < 5:
            yield from _flat({str(one): part for one, part in inner.items()}, name)
        else:
            yield name.removesuffix("."), value


def _csv_rows(text: str) -> list[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = csv_delimiter(lines[0]) if lines else None
    if len(lines) < 2 or delimiter is None:
        return []
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    return [row for row in reader if None not in row]


def csv_delimiter(head: str) -> str | None:
    """Return what parts the columns of a CSV whose first line this is; None if it is none."""
    delimiter = next((one for one in ",\t;" if one in head), None)
    return None if delimiter is None or re.search(r"\d", head.split(delimiter)[0]) else delimiter


def _device(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the device that a column of a row names, and the column."""
    for name in DEVICE_NAMES:
        value = str(row.get(name, "")).strip()
        if value.isdigit() and len(value) < 4:
            return f"{'rank' if 'rank' in name else 'GPU'} {value}", name
        if value and not value[0].isdigit() and len(value) < 40:
            label = name_label(value)
            return label.device or label.rank or value, name
    return "", ""


def _row_amounts(row: Mapping[str, Any], device: str, column: str) -> list[Amount]:
    names = {str(name).strip().lower(): name for name in row}
    process = names.pop("process_peak_bytes", None)
    if process is not None and "allocated_bytes" not in names:
        names = {"process_peak_bytes": process}  # a process and its tensors are never mixed
    found = []
    for name in names.values():
        value = "" if isinstance(row[name], bool) or row[name] is None else str(row[name]).strip()
        if name != column:
            found += cell_amounts(str(name), value, device)
    return found


def _step(row: Mapping[str, Any]) -> float | None:
    return next((at for name in STEP_NAMES if (at := _column(row, name)) is not None), None)


def _column(row: Mapping[str, Any], wanted: str) -> float | None:
    for name, value in row.items():
        # ``global_step/max_steps`` of ``10/22156``, ``train/step``
        if wanted in re.split(r"[/.]", str(name).strip().lower().lstrip("_")):
            number = _number(str(value).split("/")[0])
            if number is not None:
                return number
    return None


class EpochSteps:
    """Counts steps on that begin again with every epoch; those of the whole run stay as they are.

    The epoch tells one from the other where an epoch has a single reading, or two.
    """

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, int], float] = {}
        self._before: dict[str, float] = {}
        self._first = self._last = self._most = self._highest = 0.0

    def on(self, step: float, epoch: int, part: str = "") -> float:
        """Return a step as one of the whole run; a rank may be an epoch behind.

        A `part` of the run, such as its validation, may count steps of its own.
        """
        offset = self._offsets.get((part, epoch))
        if offset is None:
            again = step < self._most or step == self._last == self._first
            offset = self._highest if self._offsets and again else self._before.get(part, 0.0)
            self._offsets[part, epoch] = self._before[part] = offset
            self._first = step
        self._last, self._most = step, max(self._most, step)
        self._highest = max(self._highest, step + offset)
        return step + offset


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class TableHead:
    """The head of a table that a program prints into its log, as YOLO does."""

    names: tuple[str, ...]
    step: int  # the column of the step or epoch
    split: Callable[[str], list[str]]

    def read(self, line: str) -> Row | None:
        """Return the row that a line is, None if it is none of this table."""
        cells = self.split(line)
        if len(cells) < len(self.names):
            return None
        at = re.fullmatch(r"\[?(\d+)(?:/\d+)?\]?", cells[self.step])
        if at is None:
            return None
        columns = zip(self.names, cells, strict=False)
        found = [one for name, cell in columns for one in cell_amounts(name, cell)]
        return (float(at[1]), found) if found else None


def table_head(line: str) -> TableHead | None:
    """Return the table that a line is the head of: words only, a step, and a column of memory."""
    if len(line) > 400 or not re.search(r"mem|rss|alloc|reserved", line, re.IGNORECASE):
        return None
    split = next(split for form, split in _SPLITS if form.search(line))
    names = split(line)
    if len(names) < (2 if split is _by_commas else 3) or re.search(r"[=:]|\d\.\d", line):
        return None
    steps = [name.lower().lstrip("#").strip() in STEP_NAMES for name in names]
    if not any(steps) or not any(describe(name).memory for name in names):
        return None
    return TableHead(tuple(names), steps.index(True), split)


def _by_bars(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[|│┃]", line.strip().strip("|│┃"))]


def _by_commas(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


def _by_gaps(line: str) -> list[str]:
    return re.split(r"\t+|\s{2,}", line.strip())


_SPLITS: tuple[tuple[re.Pattern[str], Callable[[str], list[str]]], ...] = (
    (re.compile("[|\u2502\u2503].*[|\u2502\u2503]"), _by_bars),
    (re.compile(","), _by_commas),
    (re.compile(r"\S(?:\s{2,}|\t)\S"), _by_gaps),
    (re.compile(""), str.split),
)
