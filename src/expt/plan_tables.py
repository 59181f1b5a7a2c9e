"""Tables of predicted memory: one plan with its breakdown, or several plans side by side.

Plans come as the content of ``plan.json``, so that stored ones print like new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from expt.units import format_bytes

MODULE_ROWS = 8
COLUMNS = ("job", "preset", "device", "predicted peak", "interval", "reserved", "mostly", "fits")


def plan_table(record: Mapping[str, Any]) -> Table:
    """Return a plan's peak by category and by module."""
    table = Table(box=box.SIMPLE_HEAD, title=headline(record), title_justify="left")
    table.add_column("at the peak")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    peak = record["peak_bytes"]
    for name, count in sorted(record["by_category"].items(), key=lambda item: -item[1]):
        table.add_row(name, format_bytes(count), f"{100 * count / peak:.1f} %")
    table.add_section()
    for name, count in list(record["by_module"].items())[:MODULE_ROWS]:
        table.add_row(name, format_bytes(count), f"{100 * count / peak:.1f} %", style="dim")
    for name, count in record["corrections"].items():
        table.add_row(f"correction: {name}", format_bytes(count), "", style="dim")
    if (captured := record.get("captured_reserved_bytes")) is not None:
        more = captured - record["reserved_bytes"]
        name = "reserved, more as a CUDA graph (trainer.compile)"
        table.add_row(name, format_bytes(max(more, 0)), "", style="dim")
    return table


def headline(record: Mapping[str, Any]) -> str:
    """Return the plan in one line."""
    line = f"predicted peak on {record['target']}: {spelled_out(record)}"
    if record["budget_bytes"] is not None:
        verdict = {True: "fits", False: "does NOT fit", None: "may or may not fit"}
        line += f"; {verdict[record['fits']]} the budget of {format_bytes(record['budget_bytes'])}"
    return line


def spelled_out(record: Mapping[str, Any]) -> str:
    """Return a predicted peak with its interval and cause."""
    low, high = record["interval_bytes"]
    upper = "an unknown amount" if high is None else format_bytes(high)
    return (
        f"{format_bytes(record['peak_bytes'])} ({format_bytes(low)} to {upper}), in "
        f"{record['phase'].replace('_', ' ')}, mostly {record['dominant'].replace('_', ' ')}"
    )


def comparison_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return plans side by side, one row each."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 3 else "right")
    for name, record in records.items():
        table.add_row(*_cells(name, record))
    return table


def comparison_markdown(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the same table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(name, record)) + " |" for name, record in records.items()]
    return "\n".join(lines) + "\n"


def _cells(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = record["interval_bytes"]
    reserved = record["reserved_bytes"]
    return (
        name,
        record["preset"] or "-",
        record["target"],
        format_bytes(record["peak_bytes"]),
        f"{format_bytes(low)} to {'?' if high is None else format_bytes(high)}",
        "-" if reserved is None else format_bytes(reserved),
        record["dominant"].replace("_", " "),
        {True: "yes", False: "NO", None: "-"}[record["fits"]],
    )
