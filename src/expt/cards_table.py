"""The table of `task=cards`: how to train one model on cards of several sizes.

Rows come as the content of ``cards.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from expt.units import format_bytes

COLUMNS = (
    "card", "for tensors", "batch", "precision", "checkpointing", "peak", "reserved", "fits",
)  # fmt: skip


def cards_table(record: Mapping[str, Any]) -> Table:
    """Return one row per card."""
    table = Table(box=box.SIMPLE_HEAD, title=assumptions(record), title_justify="left")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if 2 <= number <= 4 else "right")
    for row in record["cards"]:
        table.add_row(*_cells(row), style=None if row["fits"] else "dim")
    return table


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the same table as Markdown."""
    lines = [
        assumptions(record),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in record["cards"]]
    return "\n".join(lines) + "\n"


def assumptions(record: Mapping[str, Any]) -> str:
    """Return what the table rests on, in a sentence."""
    return (
        f"Predicted for CUDA, a step's batch of {record['batch_size']} kept: micro-batch x "
        f"accumulation. For tensors: the card less {record['context_gib']:g} GiB for the CUDA "
        f"context; the peak may take {record['margin']:.0%} of it, what is reserved all of it."
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["fits"]:
        verdict = "yes"
    else:
        verdict = f"NO, by {format_bytes(row['excess_bytes'])}"
        if row["phase"] == "evaluation":
            verdict += " in evaluation (data.eval_batch_size, memory.forward_chunks)"
    checkpointing = row["activation_checkpointing"]
    return (
        f"{row['card_gib']:g} GiB",
        format_bytes(row["usable_bytes"]),
        f"{row['micro_batch']} x {row['gradient_accumulation']}",
        row["precision"],
        {True: "yes", False: "no"}.get(checkpointing, str(checkpointing)),
        format_bytes(row["peak_bytes"]),
        format_bytes(row["reserved_bytes"]),
        verdict,
    )
