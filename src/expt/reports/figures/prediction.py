"""How far predicted peaks were from measured ones, run after run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expt.reports.figures.style import (
    BLUE,
    GREY,
    INK,
    PALE,
    byte_unit,
    draw,
    plain_log,
    whole_numbers,
)
from expt.reports.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Accuracy:
    """Signed errors of the predictions in per cent, in the order of the runs, and of how many."""

    errors: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the sizes of the errors."""
        return statistics.median(abs(error) for error in self.errors)

    @property
    def worst(self) -> float:
        """The error that is farthest from zero."""
        return max(self.errors, key=abs)

    def words(self) -> str:
        """Return the figures in a sentence."""
        count = len(self.errors)
        of = f"over {count} runs" if count > 1 else "of one run"
        return f"Median error {self.median:.2f} % {of}, worst {self.worst:+.2f} %."


def accuracy(records: Sequence[RunRecord]) -> Accuracy | None:
    """Return the errors of all runs that have one, None without such a run."""
    errors = [100 * r.prediction_error for r in records if r.prediction_error is not None]
    return Accuracy(tuple(errors)) if errors else None


def plot_prediction(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw measured against predicted peaks, and the error run by run; return the files."""
    known = [
        record
        for record in records
        if record.prediction_error is not None
        and record.predicted_peak_bytes is not None
        and record.peak_allocated_bytes is not None
    ]
    if not known:
        return []

    def onto(figure: Figure) -> None:
        both, over_runs = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _against(both, known)
        _over_runs(over_runs, known)

    return draw(folder, "prediction", 2.9, onto)


def _against(axes: Axes, known: Sequence[RunRecord]) -> None:
    predicted = [record.predicted_peak_bytes or 0 for record in known]
    measured = [record.peak_allocated_bytes or 0 for record in known]
    unit, factor = byte_unit([*predicted, *measured])
    x, y = [p / factor for p in predicted], [m / factor for m in measured]
    low, high = min(*x, *y), max(*x, *y)
    if high > 12 * low:
        plain_log(axes, "x")
        plain_log(axes, "y")
        low, high = low / 1.4, high * 1.4
    else:
        margin = 0.08 * (high - low) or 0.1 * high
        low, high = low - margin, high + margin
    axes.plot([low, high], [low, high], color=PALE, linewidth=1.2, zorder=1)
    axes.scatter(x, y, s=26, color=BLUE, alpha=0.85, linewidth=0, zorder=2)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set(xlabel=f"predicted peak ({unit})", ylabel=f"measured peak ({unit})")
    axes.set_aspect("equal", adjustable="box")
    axes.grid(True)


def _over_runs(axes: Axes, known: Sequence[RunRecord]) -> None:
    errors = [100 * (record.prediction_error or 0.0) for record in known]
    order = range(1, len(errors) + 1)
    middle = statistics.median(abs(error) for error in errors)
    axes.axhspan(-middle, middle, color=BLUE, alpha=0.1, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.vlines(order, 0, errors, color=GREY, linewidth=0.9, zorder=2)
    axes.scatter(order, errors, s=22, color=BLUE, zorder=3, linewidth=0)
    reach = max(1.15 * max(abs(error) for error in errors), 0.05)
    axes.set(ylim=(-reach, reach), xlabel="run, in the order of starting")
    axes.set_ylabel("error of the prediction (%)")
    axes.set_xlim(0.4, len(errors) + 0.6)
    whole_numbers(axes.xaxis)
    axes.grid(axis="y")
    axes.set_title(f"half are within ±{middle:.2f} %", fontsize=8.5, fontweight="normal")
