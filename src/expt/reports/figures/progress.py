"""A metric of run after run, and the best inside the budget so far: how a search went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.job import Metric
from expt.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    draw,
    legend_above,
    metric_axis,
    whole_numbers,
    without_outliers,
)
from expt.reports.records import RunRecord
from expt.result import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_RUNS = 5
"""Below which the table says it all."""
TICKS = (
    (ORANGE, "predicted over", {Outcome.predicted_over}),
    (RED, "out of memory", {Outcome.out_of_memory}),
    (
        GREY,
        "failed",
        {Outcome.failed, Outcome.diverged, Outcome.killed, Outcome.timeout, Outcome.refused},
    ),
)


def best_so_far(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None
) -> list[tuple[int, float]]:
    """Return (place from 1, figure) of every run that was better than all before, budget kept."""
    found: list[tuple[int, float]] = []
    for place, record in enumerate(records, 1):
        if record.value is None or not record.fits(budget_bytes):
            continue
        if metric.better(record.value, found[-1][1] if found else None):
            found.append((place, record.value))
    return found


def plot_progress(
    records: Sequence[RunRecord], metric: Metric, budget_bytes: int | None, folder: Path
) -> list[Path]:
    """Draw every run in the order of its start; return the files, none for a few runs."""
    points = [(place, r) for place, r in enumerate(records, 1) if r.value is not None]
    if len(points) < LEAST_RUNS:
        return []

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        label = "run" if budget_bytes is None else "inside budget"
        kinds: tuple[tuple[bool, dict[str, Any]], ...] = (
            (True, {"color": BLUE, "label": label}),
            (False, {"facecolor": "white", "edgecolor": BLUE, "label": "over budget"}),
        )
        for inside, look in kinds:
            chosen = [(p, r.value) for p, r in points if r.fits(budget_bytes) is inside]
            if chosen:
                x, y = zip(*chosen, strict=True)
                axes.scatter(x, y, s=22, linewidth=1, zorder=3, **look)
        best = best_so_far(records, metric, budget_bytes)
        if best:
            x, y = zip(*best, (len(records), best[-1][1]), strict=True)
            axes.step(x, y, where="post", color=GREEN, linewidth=1.6, label="best so far", zorder=2)
        without_outliers(axes, [r.value for _, r in points if r.value is not None], metric, reach=5)
        for colour, label, outcomes in TICKS:
            places = [place for place, r in enumerate(records, 1) if r.outcome in outcomes]
            if places:
                axes.scatter(
                    places, [0.02] * len(places), transform=axes.get_xaxis_transform(),
                    marker="|", s=46, color=colour, label=label, zorder=4,
                )  # fmt: skip
        axes.set_xlim(0.4, len(records) + 0.6)
        axes.set_xlabel("run, in the order of starting")
        metric_axis(axes, metric)
        whole_numbers(axes.xaxis)
        axes.grid(True)
        legend_above(axes)

    return draw(folder, "progress", 3.2, onto)
