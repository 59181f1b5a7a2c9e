"""The best inside the budget so far against wall time: how soon a search was how good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.job import Metric
from expt.reports.figures.progress import LEAST_RUNS, TICKS
from expt.reports.figures.style import (
    BLUE,
    GREEN,
    draw,
    label_direct,
    legend_above,
    metric_axis,
    without_outliers,
)
from expt.reports.records import RunRecord, metric_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAUSE_SECONDS = 120.0
"""Without any run for longer, a search was not going on; the time in between does not count."""
UNITS = ((7200.0, "h", 3600.0), (120.0, "min", 60.0), (0.0, "s", 1.0))
"""From how many seconds on a unit of the axis is used, its name, and the seconds in it."""


def clock(records: Sequence[RunRecord]) -> Callable[[float], float]:
    """Return what turns a moment (seconds since the epoch) into seconds of search, without pauses.

    Raises:
        ValueError: no run has both a start and an end.

    """
    spans = sorted((r.started, r.ended) for r in records if r.started and r.ended is not None)
    if not spans:
        raise ValueError("no run has both a start and an end")
    origin, until = spans[0]
    pauses: list[tuple[float, float]] = []
    for start, end in spans[1:]:
        if start - until > PAUSE_SECONDS:
            pauses.append((until, start))
        until = max(until, end)

    def elapsed(moment: float) -> float:
        paused = sum(min(moment, end) - start for start, end in pauses if start < moment)
        return moment - origin - paused

    return elapsed


def best_over_time(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None
) -> list[tuple[float, float]]:
    """Return (seconds of search, figure) of every run that, when it ended, was the best so far."""
    ended = [r for r in records if r.started and r.ended is not None]
    if not ended:
        return []
    elapsed = clock(ended)
    found: list[tuple[float, float]] = []
    for record in sorted(ended, key=lambda r: r.ended or 0.0):
        if record.value is None or not record.fits(budget_bytes):
            continue
        if metric.better(record.value, found[-1][1] if found else None):
            found.append((elapsed(record.ended or 0.0), record.value))
    return found


def plot_over_time(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None, folder: Path
) -> list[Path]:
    """Draw the best so far against wall time; return the files, none for a few runs."""
    ended = [r for r in records if r.started and r.ended is not None]
    figures = [r for r in ended if r.value is not None]
    best = best_over_time(ended, metric, budget_bytes)
    if len(figures) < LEAST_RUNS or not best:
        return []
    elapsed = clock(ended)
    last = max(elapsed(r.ended or 0.0) for r in ended)
    unit, factor = next((name, size) for least, name, size in UNITS if last >= least)

    def at(record: RunRecord) -> float:
        return elapsed(record.ended or 0.0) / factor

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        label = "run" if budget_bytes is None else "inside budget"
        kinds: tuple[tuple[bool, dict[str, Any]], ...] = (
            (True, {"color": BLUE, "label": label}),
            (False, {"facecolor": "white", "edgecolor": BLUE, "label": "over budget"}),
        )
        for inside, look in kinds:
            chosen = [r for r in figures if r.fits(budget_bytes) is inside]
            if chosen:
                values = [r.value for r in chosen if r.value is not None]
                axes.scatter([at(r) for r in chosen], values, s=16, linewidth=1, zorder=3, **look)
        x, y = zip(*((t / factor, v) for t, v in best), strict=True)
        axes.step(
            [*x, last / factor], [*y, y[-1]], where="post", color=GREEN, linewidth=1.8,
            label="best so far", zorder=2,
        )  # fmt: skip
        without_outliers(axes, [r.value for r in figures if r.value is not None], metric, reach=5)
        for colour, label, outcomes in TICKS:
            moments = [at(r) for r in ended if r.outcome in outcomes]
            if moments:
                axes.scatter(
                    moments, [0.02] * len(moments), transform=axes.get_xaxis_transform(),
                    marker="|", s=46, color=colour, label=label, zorder=4,
                )  # fmt: skip
        axes.set_xlim(0, 1.02 * last / factor)
        axes.set_xlabel(f"wall time ({unit})")
        metric_axis(axes, metric)
        axes.grid(True)
        legend_above(axes)
        label_direct(
            axes, metric_text(metric, y[-1]), (last / factor, y[-1]), (-4, 5), ha="right",
            color=GREEN, fontweight="bold",
        )  # fmt: skip

    return draw(folder, "over_time", 3.2, onto)
