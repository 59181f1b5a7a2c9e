"""A small page of what is watched: curves as SVG, drawn in microseconds, and no script in it.

While it goes on the page asks its browser to read it again; it needs no server and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from expt.reports.figures.memory import Watched, time_unit
from expt.reports.figures.style import BLUE, GREY, RED
from expt.units import format_bytes

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 220, 8, 200, 8, 26
"""Of a panel, and of what lies around its curves, in pixels."""
STYLE = """svg { display: block; width: 100%; max-width: 46rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #444; }
.ringing { border-left: 4px solid #D55E00; padding-left: .8rem; }
"""


@dataclass(frozen=True)
class WatchPage:
    """What is shown; `refresh_seconds` is None once it has ended."""

    title: str
    state: str
    cards: Sequence[tuple[str, str]]
    devices: Sequence[Watched]
    alarms: Sequence[Sequence[str]]
    notes: Sequence[str]
    refresh_seconds: float | None


def render(page: WatchPage) -> str:
    """Return the page as one HTML document."""
    style = (files("expt.reports") / "page.css").read_text(encoding="utf-8")
    again = "" if page.refresh_seconds is None else _again(page.refresh_seconds)
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(about)}</span></div>'
        for value, about in page.cards
    )
    alarms = "".join(
        f'<p class="ringing">{"<br>".join(escape(line.strip()) for line in lines)}</p>'
        for lines in reversed(page.alarms)
    )
    drawn = [device for device in page.devices if len(device.readings) > 1]
    until = max((device.end_seconds for device in drawn), default=0.0)
    panels = "".join(f"<h2>{escape(device.title)}</h2>{curves(device, until)}" for device in drawn)
    notes = "".join(f"<p>{escape(note)}</p>" for note in page.notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{again}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{style}{STYLE}</style></head>\n<body>"
        f'<header><h1>{escape(page.title)}</h1><p class="soft">{escape(page.state)}</p></header>\n'
        f'<div class="cards">{cards}</div>\n'
        f"{'<h2>Alarms</h2>' + alarms if alarms else ''}\n{panels}\n"
        f"<footer>{notes}</footer></body></html>\n"
    )


def _again(seconds: float) -> str:
    return f'<meta http-equiv="refresh" content="{max(round(seconds), 1)}">'


def curves(device: Watched, end: float) -> str:
    """Return one device's bytes over time as SVG, from 0 to `end` seconds."""
    span, top = max(end, 1e-9), device.top_bytes
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(seconds: float, count: float) -> str:
        x = LEFT + wide * seconds / span
        return f"{x:.1f},{TOP + high * (1 - count / top):.1f}"

    parts = []
    ends: list[tuple[float, str]] = []
    for name, colour, counts in device.lines():
        pairs = zip(device.readings, counts, strict=True)
        points = " ".join(at(reading.step, count) for reading, count in pairs)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        ends.append((counts[-1], f"{name} {format_bytes(counts[-1])}"))
    levels = [(device.limit_bytes, "limit", RED, ""), (device.alarm_bytes, "alarm", RED, "2 4")]
    if device.predicted_bytes:
        levels.append((device.predicted_bytes, "predicted peak", GREY, "8 3 2 3"))
    for level, name, colour, dashes in levels:
        if level <= top:
            parts.append(_line(at(0.0, level), at(end, level), colour, dashes))
            ends.append((level, f"{name} {format_bytes(round(level))}"))
    if ends_of_line := device.forecast():
        (first, held), (last, then) = ends_of_line
        parts.append(_line(at(first, held), at(last, then), BLUE, "7 5"))
    parts += _labels(ends, top)
    word, length = time_unit(end)
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        when = share * span / length
        parts.append(
            f'<text x="{LEFT + share * wide:.0f}" y="{HEIGHT - 8}" text-anchor="{anchor}">'
            f"{when:.3g} {word}</text>"
        )
    frame = f'<path d="M{LEFT},{TOP}V{TOP + high}H{LEFT + wide}" fill="none" stroke="#bbb"/>'
    said = escape("; ".join(words for _, words in ends))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f"{frame}{''.join(parts)}</svg>"
    )


def _line(begin: str, end: str, colour: str, dashes: str) -> str:
    (x1, y1), (x2, y2) = begin.split(","), end.split(",")
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5"'
        f"{dashed}/>"
    )


def _labels(ends: Sequence[tuple[float, str]], top: float) -> list[str]:
    """Write what lines are beside their ends, moved apart where they would cover each other."""
    high, free, found = HEIGHT - TOP - BOTTOM, 0.0, []
    for level, words in sorted(ends, key=lambda one: -one[0]):
        y = max(TOP + high * (1 - level / top) + 4, free)
        free = y + 14
        found.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y:.0f}">{escape(words)}</text>')
    return found
