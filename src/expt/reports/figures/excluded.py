"""What the budget excluded: suggestions by their ends, at their peaks beside the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expt.reports.figures.style import BLUE, GREY, INK, ORANGE, RED, byte_unit, draw, plain_log
from expt.reports.records import RunRecord
from expt.result import Outcome
from expt.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 6.0
"""Ratio of the largest to the smallest peak from which on the axis is logarithmic."""
INSIDE, OVER, LOST, SPARED, PRUNED = ROWS = (
    "trained inside", "trained, over", "out of memory", "not started: predicted over",
    "ended by the pruner",
)  # fmt: skip
"""What may become of a suggestion, as far as memory is concerned."""
COLOURS = {INSIDE: BLUE, OVER: RED, LOST: RED, SPARED: ORANGE, PRUNED: GREY}
ENDS = {
    Outcome.out_of_memory: LOST,
    Outcome.predicted_over: SPARED,
    Outcome.pruned: PRUNED,
}


@dataclass(frozen=True)
class Excluded:
    """Suggestions by what became of them, in the order of `ROWS`; only rows that have any.

    `others` counts those that are in no row, by their ends, and `started` all that were started.
    """

    rows: Mapping[str, Sequence[RunRecord]]
    budget_bytes: int
    others: Mapping[str, int]
    started: int

    def words(self) -> str:
        """Return what the figure shows."""
        counts = "; ".join(f"{label}: {len(own)}" for label, own in self.rows.items())
        text = f"Suggestions at their peaks beside the budget, {format_bytes(self.budget_bytes)} "
        text += f"({counts}). A ring is what was predicted, a disc what was measured."
        if self.others:
            ends = ", ".join(f"{count} {end}" for end, count in self.others.items())
            text += f" Not shown, as what ended otherwise, or at a peak that is not known: {ends}."
        wasted = sum(len(self.rows.get(label, ())) for label in (OVER, LOST))
        wasted += self.others.get(Outcome.out_of_memory.words, 0)
        if self.started:
            text += f" Of {self.started} runs that were started, {wasted} did not fit."
        return text


def excluded(records: Sequence[RunRecord], budget_bytes: int | None) -> Excluded | None:
    """Return what a budget excluded, None without one, or where all that is known fitted."""
    if budget_bytes is None:
        return None
    rows: dict[str, list[RunRecord]] = {label: [] for label in ROWS}
    others: Counter[str] = Counter()
    for record in records:
        end = ENDS.get(record.outcome)
        if record.outcome.trained:
            end = INSIDE if record.is_inside(budget_bytes) else OVER
        if end is not None and _peak(record) is not None:
            rows[end].append(record)
        else:
            others[record.outcome.words] += 1
    known = {label: own for label, own in rows.items() if own}
    if not known.keys() - {INSIDE}:
        return None
    return Excluded(known, budget_bytes, others, sum(map(_was_started, records)))


def _was_started(record: RunRecord) -> bool:
    if record.outcome is Outcome.unfinished:
        return record.started > 0  # else it waits
    return record.outcome.columns.counts


def plot_excluded(found: Excluded | None, folder: Path) -> list[Path]:
    """Draw a row for each end, a point for each suggestion; return the files, none without any."""
    if found is None:
        return []
    peaks = [peak for own in found.rows.values() for r in own if (peak := _peak(r)) is not None]
    unit, factor = byte_unit([found.budget_bytes])

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        if max(peaks) > WIDE * min(peaks):
            plain_log(axes, "x")
        for place, (label, own) in enumerate(found.rows.items()):
            for number, record in enumerate(own):
                # Spread by a fixed pattern, so that the figure is the same each time.
                height = place + 0.24 * ((number * 0.618) % 1 - 0.5) * 2
                measured = record.outcome.trained and record.demand_bytes is not None
                axes.scatter(
                    [(_peak(record) or 0) / factor], [height], s=22, linewidth=1.0, zorder=3,
                    edgecolor=COLOURS[label], facecolor=COLOURS[label] if measured else "white",
                )  # fmt: skip
        at = found.budget_bytes / factor
        axes.axvline(at, color=RED, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.9 * at), max(high, 1.12 * at))
        axes.axvspan(at, axes.get_xlim()[1], color=RED, alpha=0.06, linewidth=0, zorder=0)
        axes.annotate(
            f"budget {at:.4g} {unit}", (at, 1), xycoords=("data", "axes fraction"),
            textcoords="offset points", xytext=(0, 4), ha="center", va="bottom", fontsize=8,
            color=RED,
        )  # fmt: skip
        labels = [f"{label}  {len(own)}" for label, own in found.rows.items()]
        axes.set_yticks(range(len(labels)), labels, color=INK)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"peak memory ({unit})")
        axes.grid(axis="x")

    return draw(folder, "excluded", 0.9 + 0.42 * len(found.rows), onto)


def _peak(record: RunRecord) -> int | None:
    """Return the measured peak of what came to its end, else the predicted one.

    Both are what was compared with the budget: on CUDA, what the allocator reserves.
    """
    if record.outcome.trained and record.demand_bytes is not None:
        return record.demand_bytes
    return record.predicted_demand_bytes or record.predicted_peak_bytes or record.demand_bytes
