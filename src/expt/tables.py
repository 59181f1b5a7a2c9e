"""Tables on the console and in Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table as wide as it needs, also into a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
