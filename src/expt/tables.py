"""Tables on the console and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 120


def plain_console() -> Console:
    """Return a console as wide as the terminal, or a pipe; brackets in a text are no style."""
    width = None if Console().is_terminal else PIPE_WIDTH
    return Console(width=width, markup=False, emoji=False)


def print_table(table: Table) -> None:
    """Print a table as wide as it needs, also into a pipe."""
    plain_console().print(table)


def markdown_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows of cells as Markdown, the heads first; columns `right` are numbers."""
    heads = rows[0]
    rule = ["---:" if number in right else "---" for number in range(len(heads))]
    lines = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(lines) + "\n"


def escaped(cell: str) -> str:
    """Return a text as a cell of a Markdown table, which is one line."""
    return " ".join(cell.replace("|", "\\|").splitlines())


def csv_cell(value: object) -> object:
    """Return a value for a CSV file; a text that a spreadsheet would run as a formula is quoted."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value  # a number
