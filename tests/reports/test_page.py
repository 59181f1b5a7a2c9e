from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from expt.reports.page import Card, Page, Picture, render
from expt.reports.run_table import Cells

VOID = {"meta", "img", "wbr"}
NASTY = '<script>alert("x")</script> & more'


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place; collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path: Path) -> Page:
    (tmp_path / "a.png").write_bytes(b"\x89PNG not really")
    return Page(
        title=NASTY,
        subtitle="two runs",
        lead="The best is a.",
        cards=[Card("3.1", "best", good=True), Card("2", "runs")],
        pictures=[Picture("A picture", tmp_path / "a.png", f"what it shows {NASTY}")],
        table=Cells(("run", "the_error"), (False, True), (("a", "3.1"), (NASTY, "4"))),
        table_words="All runs.",
        marked=[0],
        dimmed=[1],
        missing=["Importances: too few runs."],
        problems=[],
        footer=["Made today."],
        command=f"python -m expt {NASTY}",
    )


def test_it_is_sound_html_with_everything_inside(page: Page) -> None:
    text = render(page)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    data = base64.b64encode(b"\x89PNG not really").decode()
    assert parser.addresses == [f"data:image/png;base64,{data}"], "nothing is asked of a network"
    assert not re.search(r"https?://|@import|url\(", text)
    assert "width=device-width" in text
    assert "@media print" in text


def test_what_runs_are_called_cannot_break_it(page: Page) -> None:
    text = render(page)
    parser = Balanced()
    parser.feed(text)
    assert "script" not in parser.tags
    assert text.count("&lt;script&gt;") == 6


def test_rows_are_marked(page: Page) -> None:
    text = render(page)
    assert re.search(r"<tr class='best'><td>a</td><td class=\"n\">3\.1</td></tr>", text)
    assert text.count("<tr class='dim'>") == 1


def test_an_empty_list_has_no_heading(page: Page) -> None:
    text = render(page)
    assert "What went wrong" not in text
    assert "What is not shown, and why" in text
