"""Error against peak memory: the front of runs that no other beats in both, and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    plain_log,
)
from expt.reports.records import RunRecord, labels, metric_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 12
"""Runs in a figure up to which each is called by its name there."""
WIDE = 12.0
"""Ratio of the largest to the smallest peak from which on the axis is logarithmic."""
MOSTLY_RIGHT = 0.6
"""Part of the axis from which on a word is written to the left of its point."""
ENDED_BADLY = {
    "out_of_memory": (RED, "x", "out of memory"),
    "predicted_over": (ORANGE, "+", "predicted over, not run"),
    "pruned": (GREY, "|", "pruned"),
}
"""States without an error whose peak is known; they are drawn along the upper edge."""


def front(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs that no other run beats in both error and peak, from the smallest peak.

    Of runs that are equal in both, one is returned.
    """
    found: list[RunRecord] = []
    known = [r for r in records if r.error is not None and r.demand_bytes is not None]
    for record in sorted(known, key=lambda r: (r.demand_bytes or 0, r.error or 0.0)):
        if not found or _error(record) < _error(found[-1]):
            found.append(record)
    return found


def best_run(records: Sequence[RunRecord], budget_bytes: int | None) -> RunRecord | None:
    """Return the run with the smallest error inside the budget, None if there is none."""
    fitting = [record for record in records if record.fits(budget_bytes)]
    return min(fitting, key=_error, default=None)


def plot_trade_off(
    records: Sequence[RunRecord], metric: str, budget_bytes: int | None, folder: Path
) -> list[Path]:
    """Draw every run, the front and the budget; return the files, none without a measured run."""
    known = [r for r in records if r.error is not None and r.demand_bytes is not None]
    if not known:
        return []
    others = [r for r in records if r.state in ENDED_BADLY and _peak(r) is not None]
    measured = [r.demand_bytes for r in known if r.demand_bytes is not None]
    # What is far beyond all that can be had is drawn at the edge.
    edge = int(1.6 * max(*measured, budget_bytes or 0))
    peaks = [*measured, *(min(_peak(r) or 0, edge) for r in others)]
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
        best_of_all = front(known)
        _stairs(axes, best_of_all, factor)
        axes.margins(x=0.1, y=0.14)
        _bounds(axes, known)
        axes.update_datalim([(peak / factor, _error(known[0])) for peak in peaks])
        _upper_edge(axes, others, edge, factor)
        if budget_bytes is not None:
            _budget(axes, budget_bytes, unit, factor)
        best = best_run(known, budget_bytes)
        for record, name in zip(known, labels(known), strict=True):
            if record is best:
                best_name = name
            elif len(known) <= MOST_LABELS:
                _beside(axes, record, factor, name, 5, color=GREY)
        if best is not None:
            axes.scatter(
                *_at(best, factor), marker="*", s=170, color=GREEN, edgecolor="white", zorder=5
            )
            text = f"best: {best_name}, {_error(best):.3f}"
            _beside(axes, best, factor, text, -13, color=GREEN, fontweight="bold")
        reserved = any(r.peak_reserved_bytes is not None for r in known)
        axes.set_xlabel(f"peak memory, {'reserved' if reserved else 'allocated'} ({unit})")
        axes.set_ylabel(metric_words(metric))
        axes.grid(True)
        legend_above(axes)

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


def _bounds(axes: Axes, known: Sequence[RunRecord]) -> None:
    """Keep a run that diverged from squeezing all others into one line."""
    errors = sorted(_error(record) for record in known)
    low, middle = errors[0], errors[len(errors) // 2]
    top = middle + 4 * (middle - low)
    if len(errors) >= 8 and low < top < errors[-1]:
        axes.set_ylim(low - 0.08 * (top - low), top)
        axes.annotate(
            f"{sum(error > top for error in errors)} more above", (1, 1), ha="right", va="bottom",
            xycoords="axes fraction", fontsize=7.5, color=GREY,
        )  # fmt: skip


def _upper_edge(axes: Axes, records: Sequence[RunRecord], edge_bytes: int, factor: int) -> None:
    for state, (colour, marker, label) in ENDED_BADLY.items():
        peaks = [min(_peak(record) or 0, edge_bytes) for record in records if record.state == state]
        if peaks:
            axes.scatter(
                [peak / factor for peak in peaks],
                [0.965] * len(peaks),
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


def _beside(axes: Axes, record: RunRecord, factor: int, text: str, up: float, **look: Any) -> None:
    """Write beside a run, on the side where there is more room."""
    at = _at(record, factor)
    place, _ = axes.transAxes.inverted().transform(axes.transData.transform(at))
    right = place > MOSTLY_RIGHT
    side = {"ha": "right"} if right else {"ha": "left"}
    label_direct(axes, text, at, offset=(-7 if right else 7, up), **side, **look)


def _at(record: RunRecord, factor: int) -> tuple[float, float]:
    return (record.demand_bytes or 0) / factor, _error(record)


def _peak(record: RunRecord) -> int | None:
    """Return the measured peak, and the predicted one for a run that has none or ran out."""
    if record.state == "completed" or record.state == "over_budget":
        return record.demand_bytes
    return record.predicted_peak_bytes or record.demand_bytes


def _error(record: RunRecord) -> float:
    return float("inf") if record.error is None else record.error
