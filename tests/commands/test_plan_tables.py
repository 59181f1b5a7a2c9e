"""Plans as tables: the breakdown of one, several side by side."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from expt.commands.plan import COLUMNS, comparison_markdown, comparison_table, headline, plan_table

MIB = 2**20
RECORD: dict[str, Any] = {
    "target": "cuda",
    "peak_bytes": 1024 * MIB,
    "reserved_bytes": 1100 * MIB,
    "interval_bytes": [1000 * MIB, 1200 * MIB],
    "phase": "optimizer_step",
    "by_category": {"parameters": 256 * MIB, "optimizer_state": 768 * MIB, "workspaces": 0},
    "by_module": {f"layer.{n}": (20 - n) * MIB for n in range(12)},
    "corrections": {"cuBLAS workspace": 8 * MIB},
    "dominant": "optimizer_state",
    "preset": "full",
    "budget_bytes": None,
    "fits": None,
}


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_a_headline_says_what_matters() -> None:
    line = headline(RECORD)
    assert line.startswith("predicted peak on cuda: 1.00 GiB (1000.0 MiB to 1.17 GiB)")
    assert "in optimizer step, mostly optimizer state" in line
    assert "budget" not in line
    fitting = headline({**RECORD, "budget_bytes": 2048 * MIB, "fits": True})
    assert fitting.endswith("; fits the budget of 2.00 GiB")
    assert "does NOT fit" in headline({**RECORD, "budget_bytes": 512 * MIB, "fits": False})


def test_a_plan_without_an_upper_bound_promises_nothing() -> None:
    record = {**RECORD, "interval_bytes": [1024 * MIB, None], "reserved_bytes": None}
    assert "to an unknown amount" in headline(record)
    line = headline({**record, "budget_bytes": 2048 * MIB, "fits": None})
    assert "may or may not fit the budget of 2.00 GiB" in line
    assert "1.00 GiB to ?" in comparison_markdown({"0": record})


def test_the_breakdown_is_ordered_and_cut() -> None:
    text = printed(plan_table(RECORD))
    assert text.index("optimizer_state") < text.index("parameters") < text.index("layer.0")
    assert "75.0 %" in text
    assert "layer.7" in text
    assert "layer.8" not in text
    assert "correction: cuBLAS workspace" in text
    assert "8.0 MiB" in text


def test_plans_side_by_side_on_the_terminal_and_in_markdown() -> None:
    small = {**RECORD, "preset": None, "peak_bytes": 10 * MIB, "fits": True, "reserved_bytes": None}
    records = {"0": {**RECORD, "fits": False}, "1": small}
    text = printed(comparison_table(records))
    lines = comparison_markdown(records).splitlines()
    assert len(lines) == 4
    assert all(column in text and column in lines[0] for column in COLUMNS)
    assert lines[2].split(" | ")[1:4] == ["full", "cuda", "1.00 GiB"]
    assert lines[2].endswith("| NO |")
    assert lines[3].split(" | ")[1:4] == ["-", "cuda", "10.0 MiB"]
    assert lines[3].endswith("| - | optimizer state | yes |")
    for line in lines[2:]:
        assert all(cell.strip() in text for cell in line.strip("| ").split(" | "))
