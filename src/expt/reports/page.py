"""The page: one HTML file with everything inside it, for a screen, a phone and a printer.

It asks no network and runs no script; pictures are in it as data, and ``page.css`` as it stands.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from expt.reports.run_table import Cells


@dataclass(frozen=True)
class Card:
    """One figure in large letters, and what it is."""

    value: str
    about: str
    good: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows; `words` is also what a reader hears who cannot see it."""

    title: str
    path: Path
    words: str


@dataclass(frozen=True)
class Page:
    """All that is said; every text is plain, and escaped where it is put into the page.

    `marked` and `dimmed` are row numbers of `table`.
    """

    title: str
    subtitle: str
    lead: str
    cards: Sequence[Card]
    pictures: Sequence[Picture]
    table: Cells
    table_words: str
    marked: Collection[int] = ()
    dimmed: Collection[int] = ()
    missing: Sequence[str] = ()
    problems: Sequence[str] = ()
    footer: Sequence[str] = field(default_factory=tuple)
    command: str = ""
    by_data: Sequence[str] = ()


def render(page: Page) -> str:
    """Return the page as one HTML document."""
    style = (files("expt.reports") / "page.css").read_text(encoding="utf-8")
    body = [
        f"<header><h1>{escape(page.title)}</h1>",
        f'<p class="soft">{escape(page.subtitle)}</p></header>',
        f'<p class="lead">{escape(page.lead)}</p>',
        *_items(page.by_data),
        _cards(page.cards),
        *(_picture(picture) for picture in page.pictures),
        "<h2>Runs</h2>",
        f'<p class="soft">{escape(page.table_words)}</p>',
        _table(page),
        *_list("What went wrong", page.problems),
        *_list("What is not shown, and why", page.missing),
        _footer(page),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _cards(cards: Sequence[Card]) -> str:
    inside = "\n".join(
        f'<div class="card{" good" if card.good else ""}"><b>{escape(card.value)}</b>'
        f"<span>{escape(card.about)}</span></div>"
        for card in cards
    )
    return f'<div class="cards">\n{inside}\n</div>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    return (
        f"<h2>{escape(picture.title)}</h2>\n<figure>"
        f'<img alt="{escape(picture.words)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.words)}</figcaption></figure>"
    )


def _table(page: Page) -> str:
    marks = [' class="n"' if numeric else "" for numeric in page.table.numeric]
    head = "".join(
        f"<th{mark}>{escape(name).replace('_', '_<wbr>')}</th>"  # a long name may be two lines
        for mark, name in zip(marks, page.table.columns, strict=True)
    )
    rows = []
    for number, row in enumerate(page.table.rows):
        kind = "best" if number in page.marked else "dim" if number in page.dimmed else ""
        cells = "".join(
            f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True)
        )
        rows.append(f"<tr{f' class={kind!r}' if kind else ''}>{cells}</tr>")
    inside = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{inside}\n</tbody></table></div>"
    )


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", *_items(lines)] if lines else []


def _items(lines: Sequence[str]) -> list[str]:
    return ["<ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"] if lines else []


def _footer(page: Page) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in page.footer)
    command = f"<pre><code>{escape(page.command)}</code></pre>" if page.command else ""
    return f"<footer>{lines}{command}</footer>"
