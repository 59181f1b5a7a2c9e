from __future__ import annotations

import pytest
from rich.table import Table

from expt.tables import csv_cell, markdown_table, print_table


def test_brackets_in_a_cell_are_text(capsys) -> None:
    table = Table("change", "path")
    table.add_row("trainer.trainable=[expert.*]", "[/mnt/a]")
    print_table(table)
    assert "trainer.trainable=[expert.*]" in (out := capsys.readouterr().out)
    assert "[/mnt/a]" in out


def test_a_cell_of_markdown_is_one_line() -> None:
    assert markdown_table([["a"], ["x|y\nz"]]).splitlines()[2:] == ["| x\\|y z |"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("=1+1", "'=1+1"),
        ("+memory=lite", "'+memory=lite"),
        ("-cmd|' /C calc'!A0", "'-cmd|' /C calc'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tx", "'\tx"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("a=b", "a=b"),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_a_text_that_a_spreadsheet_would_run_is_quoted(value, expected) -> None:
    assert csv_cell(value) == expected
