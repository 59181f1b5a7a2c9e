"""The error of run after run, and the best inside the budget so far: how a search went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    draw,
    legend_above,
    whole_numbers,
)
from expt.reports.records import RunRecord, metric_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_RUNS = 5
"""Below which the table says it all."""
TICKS = {
    "predicted_over": (ORANGE, "predicted over"),
    "out_of_memory": (RED, "out of memory"),
    "failed": (GREY, "failed"),
}


def best_so_far(records: Sequence[RunRecord], budget_bytes: int | None) -> list[tuple[int, float]]:
    """Return (place from 1, error) of every run that was better than all before, budget kept."""
    found: list[tuple[int, float]] = []
    for place, record in enumerate(records, 1):
        better = not found or (record.error is not None and record.error < found[-1][1])
        if better and record.fits(budget_bytes) and record.error is not None:
            found.append((place, record.error))
    return found


def plot_progress(
    records: Sequence[RunRecord], metric: str, budget_bytes: int | None, folder: Path
) -> list[Path]:
    """Draw every run in the order of its start; return the files, none for a few runs."""
    points = [(place, r) for place, r in enumerate(records, 1) if r.error is not None]
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
            chosen = [(p, r.error) for p, r in points if r.fits(budget_bytes) is inside]
            if chosen:
                x, y = zip(*chosen, strict=True)
                axes.scatter(x, y, s=22, linewidth=1, zorder=3, **look)
        best = best_so_far(records, budget_bytes)
        if best:
            x, y = zip(*best, (len(records), best[-1][1]), strict=True)
            axes.step(x, y, where="post", color=GREEN, linewidth=1.6, label="best so far", zorder=2)
        errors = sorted(r.error for _, r in points if r.error is not None)
        top = errors[0] + 5 * (errors[len(errors) // 2] - errors[0])
        if errors[0] < top < errors[-1]:
            axes.set_ylim(errors[0] - 0.06 * (top - errors[0]), top)
        for state, (colour, label) in TICKS.items():
            places = [place for place, r in enumerate(records, 1) if r.state == state]
            if places:
                axes.scatter(
                    places, [0.02] * len(places), transform=axes.get_xaxis_transform(),
                    marker="|", s=46, color=colour, label=label, zorder=4,
                )  # fmt: skip
        axes.set_xlim(0.4, len(records) + 0.6)
        axes.set(xlabel="run, in the order of starting", ylabel=metric_words(metric))
        whole_numbers(axes.xaxis)
        axes.grid(True)
        legend_above(axes)

    return draw(folder, "progress", 3.2, onto)
