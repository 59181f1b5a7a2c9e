"""The table of runs, once: the same columns on the console, in Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Literal

from rich import box
from rich.table import Table

from expt.job import Metric
from expt.reports.figures.claims import ABOUT_CLAIMS, Claim, claim_of
from expt.reports.records import (
    RunRecord,
    metric_header,
    metric_text,
    short_names,
    varied,
)
from expt.tables import csv_cell, markdown_table, plain_console
from expt.units import format_bytes, format_seconds

NOTHING = "–"  # noqa: RUF001 (a dash is meant)
DATA, CLAIMED, PEAK_CLAIMED = "data", "claimed", "peak claimed"
PARTIAL = "*"
"""Marks a figure that is of a part of its split only."""
LATE = ("state", "preset", "predicted", PEAK_CLAIMED, CLAIMED, "time", "off by", "reserved")
"""Columns that the console shows where there is room beside the others; then come settings."""
LONGEST = {"run": 24, DATA: 20}
"""Characters on one line of the console."""
BESIDE = 3
"""Characters of a column besides its cells."""
CLASS = "._target_"
IN_COLUMNS = "memory/"
"""How a tracker's figures begin that have columns of their own in the CSV file."""
MOST_DIGITS = 7


@dataclass(frozen=True)
class Cells:
    """A table as text: column names, whether each holds figures, and the rows' cells.

    The last `settings` columns are settings.
    """

    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    settings: int = 0


def ordered(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None
) -> list[RunRecord]:
    """Return the runs from the best that fits, then those that do not fit, then the rest."""

    def rank(record: RunRecord) -> tuple[int, float, str]:
        cost = float("inf") if record.value is None else metric.cost(record.value)
        group = 0 if record.fits(budget_bytes) else 1 if record.value is not None else 2
        return group, cost, "" if group < 2 else record.outcome.value

    return sorted(records, key=rank)


def run_table(
    records: Sequence[RunRecord],
    metric: Metric,
    claims: Sequence[Claim],
    settings: Sequence[str] = (),
    data: Mapping[int, str] = MappingProxyType({}),
) -> Cells:
    """Return a row per run, in the order given; a column that would be empty is left out.

    Args:
        records: the rows.
        metric: that `value` is of.
        claims: of presets, for the columns of what was claimed.
        settings: dotted names of those that get a column.
        data: by the record's `id`, the name of what it was measured on, where that differs.

    """
    has_column = {"memory.preset", "data._target_"} if data else {"memory.preset"}
    names = [name for name in settings if name not in has_column]
    short = short_names(name.removesuffix(CLASS) for name in names)
    said = [claim_of(record, claims) for record in records]
    test = replace(metric, name=f"test/{metric.name.rpartition('/')[2]}")
    tested = [] if metric == test else [record.metrics.get(test.name) for record in records]
    columns: list[tuple[str, bool, list[str]]] = [
        ("run", False, [record.name for record in records]),
        (DATA, False, [data.get(id(record), "") for record in records]),
        ("preset", False, [record.preset or "" for record in records]),
        ("state", False, [record.outcome.words for record in records]),
        (metric_header(metric), True, [_figure(metric, r, r.value) for r in records]),
        (CLAIMED, True, [claim.error if claim else "" for claim in said]),
        (
            metric_header(test),
            True,
            [_figure(test, r, value) for r, value in zip(records, tested, strict=False)],
        ),
        (PEAK_CLAIMED, True, [claim.peak if claim else "" for claim in said]),
        ("predicted", True, [_bytes(r.predicted_peak_bytes) for r in records]),
        ("measured", True, [_bytes(r.peak_allocated_bytes) for r in records]),
        ("reserved", True, [_bytes(r.peak_reserved_bytes) for r in records]),
        ("off by", True, [_percent(r.prediction_error) for r in records]),
        ("time", True, [_time(r.seconds) for r in records]),
    ]
    chosen = [
        (short[name.removesuffix(CLASS)], True, [_setting(name, r.settings) for r in records])
        for name in names
    ]
    settled = [column for column in chosen if any(column[2])]
    kept = [column for column in columns if any(column[2])] + settled
    return Cells(
        tuple(name for name, _, _ in kept),
        tuple(numeric for _, numeric, _ in kept),
        tuple(
            tuple(cell or NOTHING for cell in row)
            for row in zip(*(cells for _, _, cells in kept), strict=True)
        ),
        len(settled),
    )


def console_table(cells: Cells, width: int) -> Table:
    """Return as many columns as are readable side by side, the most telling first.

    Args:
        cells: all columns.
        width: of the console, in characters.

    """
    heads = [name.replace(" ", "\n") for name in cells.columns]
    widths = []
    for name, head, *column in zip(cells.columns, heads, *cells.rows, strict=True):
        longest = max(len(line) for text in (head, *column) for line in text.split("\n"))
        widths.append(BESIDE + min(longest, LONGEST.get(name, longest)))
    fixed = cells.columns[: len(cells.columns) - cells.settings]
    first = [place for place, name in enumerate(fixed) if name not in LATE]
    late = [fixed.index(name) for name in LATE if name in fixed]
    left, kept = width - 1, []
    for place in (*first, *late, *range(len(fixed), len(cells.columns))):
        if widths[place] <= left:
            left -= widths[place]
            kept.append(place)
    table = Table(box=box.SIMPLE_HEAD)
    for place in sorted(kept):
        justify: Literal["left", "right"] = "right" if cells.numeric[place] else "left"
        table.add_column(
            heads[place],
            justify=justify,
            no_wrap=cells.columns[place] not in LONGEST,
            overflow="fold",
        )
    for row in cells.rows:
        table.add_row(*(row[place] for place in sorted(kept)))
    return table


def print_runs(cells: Cells) -> None:
    """Print the table for the console, with what is to be known about claims under it."""
    console = plain_console()
    table = console_table(cells, console.width)
    console.print(table)
    if len(table.columns) < len(cells.columns):
        print(f"{len(cells.columns) - len(table.columns)} more columns in runs.md and report.html")
    if {CLAIMED, PEAK_CLAIMED} & set(cells.columns):
        print(ABOUT_CLAIMS)


def as_markdown(cells: Cells) -> str:
    """Return the table as Markdown."""
    right = [number for number, numeric in enumerate(cells.numeric) if numeric]
    return markdown_table([cells.columns, *cells.rows], right)


def as_csv(records: Sequence[RunRecord], metric: Metric) -> str:
    """Return every run with its figures in full, and all settings that differ."""
    settings = varied(records)
    fixed = [
        "name", "trial", "state", "preset", metric.name, "predicted_peak_bytes",
        "peak_allocated_bytes", "peak_reserved_bytes", "prediction_error", "budget_bytes",
        "seconds", "parameters",
        "device", "precision", "meter", "started", "run_id", "run_dir", "detail", "partial",
    ]  # fmt: skip
    figures = sorted(
        {
            name
            for record in records
            for name in record.metrics
            if name.removeprefix(IN_COLUMNS) not in fixed
        }
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fixed, *figures, *settings])
    for r in records:
        at = datetime.fromtimestamp(r.started)
        started = at.isoformat(timespec="seconds") if r.started else None
        writer.writerow(
            csv_cell(cell)
            for cell in [
                r.name, r.trial, r.outcome.value, r.preset, r.value, r.predicted_peak_bytes,
                r.peak_allocated_bytes, r.peak_reserved_bytes, r.prediction_error, r.budget_bytes,
                r.seconds, r.weights, r.device, r.precision, r.meter, started, r.run_id, r.run_dir,
                r.detail, "; ".join(f"{split}: {words}" for split, words in r.partial.items()),
                *(r.metrics.get(name) for name in figures),
                *(r.settings.get(name) for name in settings),
            ]
        )  # fmt: skip
    return out.getvalue()


def _figure(metric: Metric, record: RunRecord, value: float | None) -> str:
    """Return a figure, marked where it is of a part of its split only."""
    text = metric_text(metric, value)
    return f"{text} {PARTIAL}" if text and metric.name.partition("/")[0] in record.partial else text


def _setting(name: str, settings: Mapping[str, str]) -> str:
    """Return a number of many digits with four that count, a class by its name, or the text."""
    text = settings.get(name, "")
    if name.endswith(CLASS):
        return text.rpartition(".")[2]
    try:
        return f"{float(text):.4g}" if len(text) > MOST_DIGITS else text
    except ValueError:
        return text


def _bytes(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.2f} %"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)
