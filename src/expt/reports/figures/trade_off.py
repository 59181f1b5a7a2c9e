"""A metric against peak memory: the front of runs that no other beats in both, and its figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.job import Metric
from expt.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    byte_unit,
    draw,
    label_direct,
    legend_above,
    metric_axis,
    plain_log,
    without_outliers,
)
from expt.reports.records import RunRecord, labels, metric_text
from expt.result import Outcome
from expt.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 12
"""Runs in a figure up to which each is called by its name there."""
WIDE = 12.0
"""Ratio of the largest to the smallest peak from which on the axis is logarithmic."""
MOSTLY_RIGHT = 0.6
"""Part of the axis from which on a word is written to the left of its point."""
HEIGHTS = (5, -13, 16, -24, 27)
"""Points above its run at which a word is tried to be written."""
ENDED_BADLY = {
    Outcome.out_of_memory: (RED, "x", "out of memory"),
    Outcome.predicted_over: (ORANGE, "+", "predicted over, not run"),
    Outcome.pruned: (GREY, "|", "pruned"),
}
"""Ends without a figure whose peak is known; they are drawn along the edge where the worst are."""


def front(records: Iterable[RunRecord], metric: Metric) -> list[RunRecord]:
    """Return the runs that no other run beats in both metric and peak, from the smallest peak.

    Of runs that are equal in both, one is returned.
    """
    found: list[RunRecord] = []
    known = [r for r in records if r.value is not None and r.demand_bytes is not None]
    for record in sorted(known, key=lambda r: (r.demand_bytes or 0, metric.cost(_value(r)))):
        if not found or metric.better(_value(record), found[-1].value):
            found.append(record)
    return found


def best_run(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None
) -> RunRecord | None:
    """Return the best run inside the budget, of equals the one that took least; None if none is."""
    fitting = [record for record in records if record.fits(budget_bytes)]

    def rank(record: RunRecord) -> tuple[float, float]:
        demand = record.demand_bytes
        return metric.cost(_value(record)), math.inf if demand is None else demand

    return min(fitting, key=rank, default=None)


def plot_trade_off(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None, folder: Path
) -> list[Path]:
    """Draw every run, the front and the budget; return the files, none without a measured run."""
    known = [r for r in records if r.value is not None and r.demand_bytes is not None]
    if not known:
        return []
    others = [r for r in records if r.outcome in ENDED_BADLY and _peak(r) is not None]
    measured = [r.demand_bytes for r in known if r.demand_bytes is not None]
    # What is far beyond all that can be had is said at the edge.
    edge = int(1.6 * max(*measured, budget_bytes or 0))
    peaks = [*measured, *(peak for r in others if (peak := _peak(r) or 0) <= edge)]
    unit, factor = byte_unit([*peaks, budget_bytes])

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        if max(peaks) > WIDE * min(peaks):
            plain_log(axes, "x")
        inside = [r for r in known if r.fits(budget_bytes)]
        over = [r for r in known if not r.fits(budget_bytes)]
        _points(
            axes,
            inside,
            factor,
            color=BLUE,
            label="run" if budget_bytes is None else "inside budget",
        )
        _points(axes, over, factor, edgecolor=BLUE, facecolor="white", label="over budget")
        best_of_all = front(known, metric)
        _stairs(axes, best_of_all, factor)
        axes.margins(x=0.1, y=0.14)
        _bounds(axes, known, metric)
        axes.update_datalim([(peak / factor, _value(known[0])) for peak in peaks])
        _worst_edge(axes, others, edge, factor, 0.965 if metric.goal == "min" else 0.035)
        if budget_bytes is not None:
            _budget(axes, budget_bytes, unit, factor)
        best = best_run(known, metric, budget_bytes)
        reserved = any(r.peak_reserved_bytes is not None for r in known)
        axes.set_xlabel(f"peak memory, {'reserved' if reserved else 'allocated'} ({unit})")
        metric_axis(axes, metric)
        axes.grid(True)
        legend_above(axes)
        figure.draw_without_rendering()  # words are placed where the limits are final
        names = dict(zip(map(id, known), labels(known), strict=True))
        written: list[Any] = []
        if best is not None:
            axes.scatter(
                *_at(best, factor), marker="*", s=170, color=GREEN, edgecolor="white", zorder=5
            )
            text = f"best: {names[id(best)]}, {metric_text(metric, best.value)}"
            _beside(axes, best, factor, text, written, color=GREEN, fontweight="bold")
        for record in known if len(known) <= MOST_LABELS else ():
            if record is not best:
                _beside(axes, record, factor, names[id(record)], written, color=GREY)

    return draw(folder, "trade_off", 4.0, onto)


def _points(axes: Axes, records: Sequence[RunRecord], factor: int, **look: Any) -> None:
    if records:
        x, y = zip(*(_at(record, factor) for record in records), strict=True)
        axes.scatter(x, y, s=34, zorder=3, linewidth=1.0, **look)


def _stairs(axes: Axes, best: Sequence[RunRecord], factor: int) -> None:
    """Draw what can be had: from every point of the front to the right, until a better one."""
    if len(best) > 1:
        x, y = zip(*(_at(record, factor) for record in best), strict=True)
        axes.step(x, y, where="post", color=INK, linewidth=1.1, zorder=2, label="Pareto front")


def _bounds(axes: Axes, known: Sequence[RunRecord], metric: Metric) -> None:
    """Keep a run that diverged from squeezing all others into one line."""
    outside = 0
    if len(known) >= 8:
        outside = without_outliers(axes, [_value(record) for record in known], metric, reach=5)
    if outside:
        upper = metric.goal == "min"
        axes.annotate(
            f"{outside} more {'above' if upper else 'below'}", (1, int(upper)), ha="right",
            va="bottom", xycoords="axes fraction", fontsize=7.5, color=GREY,
        )  # fmt: skip


def _worst_edge(
    axes: Axes, records: Sequence[RunRecord], edge_bytes: int, factor: int, height: float
) -> None:
    lower = -0.05 if height > 0.5 else 0.05
    for outcome, (colour, marker, label) in ENDED_BADLY.items():
        known = [_peak(r) or 0 for r in records if r.outcome is outcome]
        beyond = [peak for peak in known if peak > edge_bytes]
        if beyond:
            largest = format_bytes(max(beyond))
            axes.annotate(
                f"{len(beyond)} {label}, up to {largest} →", (1, height), ha="right", va="center",
                xycoords="axes fraction", fontsize=7.5, color=colour, zorder=4,
            )  # fmt: skip
            height += lower
        peaks = [peak for peak in known if peak <= edge_bytes]
        if peaks:
            axes.scatter(
                [peak / factor for peak in peaks],
                [height] * len(peaks),
                transform=axes.get_xaxis_transform(),
                marker=marker, color=colour, s=34, linewidth=1.3, label=label, zorder=4,
            )  # fmt: skip


def _budget(axes: Axes, budget_bytes: int, unit: str, factor: int) -> None:
    at = budget_bytes / factor
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9 * at), max(high, 1.12 * at))
    axes.axvline(at, color=RED, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    axes.axvspan(at, axes.get_xlim()[1], color=RED, alpha=0.06, linewidth=0, zorder=0)
    axes.annotate(
        f"budget\n{at:.4g} {unit}", (at, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", xytext=(4, 5), ha="left", va="bottom", fontsize=8, color=RED,
    )  # fmt: skip


def _beside(
    axes: Axes, record: RunRecord, factor: int, text: str, written: list[Any], **look: Any
) -> None:
    """Write beside a run where no word is yet, on the side where there is more room.

    Args:
        axes: whose limits are final.
        record: the run.
        factor: bytes in a unit of the axis.
        text: what to write; where there is no place for it, nothing is.
        written: boxes of the words so far; this one's is added.
        look: of the text.

    """
    at = _at(record, factor)
    place, _ = axes.transAxes.inverted().transform(axes.transData.transform(at))
    right = place > MOSTLY_RIGHT
    for up in HEIGHTS:
        side = {"ha": "right"} if right else {"ha": "left"}
        word = label_direct(axes, text, at, offset=(-7 if right else 7, up), **side, **look)
        box = word.get_window_extent()
        if not any(box.overlaps(other) for other in written):
            written.append(box)
            return
        word.remove()


def _at(record: RunRecord, factor: int) -> tuple[float, float]:
    return (record.demand_bytes or 0) / factor, _value(record)


def _peak(record: RunRecord) -> int | None:
    """Return the measured peak, and the predicted one for a run that has none or ran out."""
    if record.outcome.trained:
        return record.demand_bytes
    return record.predicted_peak_bytes or record.demand_bytes


def _value(record: RunRecord) -> float:
    assert record.value is not None
    return record.value
