"""What `task=allocate` prints, and the same as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from expt.tables import markdown_table, print_table
from expt.units import format_bytes

Rows = list[tuple[str, ...]]


def print_allocation(record: Mapping[str, Any]) -> None:
    """Print the answer, the division, the checklist, and what was given up."""
    for title, heads, rows in _parts(record):
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for number, head in enumerate(heads):
            table.add_column(head, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        print_table(table)
    print(answer(record))


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return all of it as Markdown."""
    parts = [
        f"{title}\n\n{markdown_table([heads, *rows])}" for title, heads, rows in _parts(record)
    ]
    return "\n".join([answer(record), "", *parts])


def answer(record: Mapping[str, Any]) -> str:
    """Return the answer in words, with the settings to add to the command line."""
    chosen = record["chosen"]
    what = (
        f"a micro-batch of {chosen['micro_batch']} x {chosen['gradient_accumulation']}, "
        f"{chosen['precision']}, "
        f"{_checkpointing(chosen['activation_checkpointing'])}"
    )
    sizes = "".join(f", {name}={value}" for name, value in chosen["sizes"].items())
    budget = format_bytes(record["budget_bytes"])
    settings = " ".join(shlex.quote(line) for line in chosen["changes"])
    if record["fits"]:
        return f"fits {budget}, {chosen['used']:.0%} used: {what}{sizes}\nadd: {settings}"
    return (
        f"does NOT fit {budget}: the least that was found takes "
        f"{format_bytes(chosen['excess_bytes'])} more ({what}{sizes})\nclosest: {settings}"
        + ("" if record["several"] else "\nallocate.devices=[2,4,8] plans it over several cards")
    )


def _parts(record: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], Rows]]:
    """Return title, heads and rows of every table."""
    chosen, budget = record["chosen"], record["budget_bytes"]
    handbook = record["handbook"]
    division: Rows = [
        (
            name.replace("_", " "),
            format_bytes(count),
            f"{100 * count / budget:.1f} %",
            format_bytes(handbook[name]) if name in handbook else "",
        )
        for name, count in chosen["by_category"].items()
    ]
    found: list[tuple[str, tuple[str, ...], Rows]] = [
        (
            f"the budget of {format_bytes(budget)} on {record['target']}, at the peak",
            ("goes to", "bytes", "share", "by the handbook's formula"),
            division,
        ),
        (
            "as it is configured, and as it is recommended",
            ("", "micro-batch", "precision", "checkpointing", "peak", "GFLOP a sample", "fits"),
            [_way("configured", record["now"]), _way("recommended", chosen)],
        ),
    ]
    if record["emergency"]:
        rows: Rows = [
            (
                step["about"],
                " ".join(step["changes"]),
                _saved(step),
                format_bytes(step["peak_bytes"]) if "peak_bytes" in step else "not possible here",
            )
            for step in record["emergency"]
        ]
        found.append(
            ("nothing fits; given up, in this order", ("what", "setting", "saves", "peak"), rows)
        )
    if record["several"]:
        shown: Rows = [
            (str(row["cards"]), how, *_on_each(row[how]))
            for row in record["several"]
            for how in ("sharded", "split")
        ]
        found.append(
            (
                f"over several cards of {format_bytes(budget)} each",
                ("cards", "how", "micro-batch", "peak of the fullest", "fits", "settings"),
                shown,
            )
        )
    if record["checklist"]:
        found.append(
            (
                "checklist: one change to the configured run at a time",
                ("now", "change", "saves", "peak", "fits"),
                [_check(row) for row in record["checklist"]],
            )
        )
    return found


def _saved(step: Mapping[str, Any]) -> str:
    """Return what a step saved when it was tried, and whether it is left out after all."""
    if "saved_bytes" not in step:
        return "-"
    if step["taken_back"]:
        return f"{format_bytes(step['saved_bytes'])}, taken back"
    return format_bytes(step["saved_bytes"]) if step["kept"] else "nothing, left out"


def _way(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    work = row["gflops_per_sample"]
    return (
        name,
        f"{row['micro_batch']} x {row['gradient_accumulation']}",
        row["precision"],
        _checkpointing(row["activation_checkpointing"]),
        format_bytes(row["peak_bytes"]),
        "-" if work is None else f"{work:.3g}",
        "yes" if row["fits"] else "NO",
    )


def _on_each(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return ("-", "-", "not possible here", row["refused"])
    return (
        str(row["micro_batch"]),
        format_bytes(row["peak_bytes"]),
        "yes" if row["fits"] else "NO",
        " ".join(row["changes"]),
    )


def _check(row: Mapping[str, Any]) -> tuple[str, ...]:
    saved = row["saved_bytes"]
    return (
        row["about"],
        " ".join(row["changes"]),
        format_bytes(saved) if saved >= 0 else f"-{format_bytes(-saved)}",
        format_bytes(row["peak_bytes"]),
        "yes" if row["fits"] else "NO",
    )


def _checkpointing(mode: object) -> str:
    words: Mapping[object, str] = {True: "checkpointed", False: "not checkpointed"}
    return words.get(mode, f"checkpointed ({mode})")
