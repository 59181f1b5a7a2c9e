"""What an expansion ends with: a table of its steps, a figure of memory and metric per step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from expt.commands.expand.policy import Step
from expt.job import Metric
from expt.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    PALE,
    RED,
    byte_unit,
    draw,
    label_direct,
    legend_above,
    metric_axis,
)
from expt.reports.records import metric_text, metric_words
from expt.result import Outcome
from expt.tables import markdown_table
from expt.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START = "start"


def expansion_table(steps: Sequence[Step], metric: Metric) -> Table:
    """Return one row per step."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in _columns(metric):
        right = name not in ("change", "kept", "why")
        # A heading is never cut: on a narrow console the text beside it is folded.
        table.add_column(
            name.replace(" ", "\n"),
            justify="right" if right else "left",
            min_width=max(map(len, name.split())),
            overflow="fold",
        )
    for step in steps:
        table.add_row(*_cells(step, metric), style=None if step.kept else "dim")
    return table


def as_markdown(steps: Sequence[Step], metric: Metric) -> str:
    """Return the same table as Markdown."""
    return markdown_table([_columns(metric), *(_cells(step, metric) for step in steps)])


def plot_expansion(
    steps: Sequence[Step], metric: Metric, budget_bytes: int | None, folder: Path
) -> list[Path]:
    """Draw peak memory and the validation's figure over the steps; return the files."""

    def onto(figure: Figure) -> None:
        memory, values = figure.subplots(2, 1, sharex=True)
        _memory(memory, steps, budget_bytes)
        _values(values, steps, metric)
        values.set_xticks(range(len(steps)))
        values.set_xticklabels([_tick(step) for step in steps], fontsize=7.5)
        values.set_xlim(-0.6, len(steps) - 0.4)

    return draw(folder, "expansion", 5.0, onto)


def _memory(axes: Axes, steps: Sequence[Step], budget_bytes: int | None) -> None:
    measured = [step.probe.demand_bytes for step in steps]
    predicted = [step.probe.predicted_peak_bytes for step in steps]
    unit, factor = byte_unit([*measured, *predicted, budget_bytes])
    for number, step in enumerate(steps):
        if (count := measured[number]) is not None:
            colour = BLUE if step.kept else PALE
            axes.bar(number, count / factor, width=0.55, color=colour, zorder=2)
    known = [(number, count / factor) for number, count in enumerate(predicted) if count]
    if known:
        x, y = zip(*known, strict=True)
        axes.scatter(
            x, y, marker="_", s=420, color=GREY, linewidth=1.6, zorder=3
        )  # fmt: skip
        axes.plot([], [], color=GREY, linewidth=1.6, label="predicted")
    axes.bar(0, 0, color=BLUE, label="measured, kept")
    axes.bar(0, 0, color=PALE, label="measured, not kept")
    if budget_bytes is not None:
        axes.axhline(budget_bytes / factor, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
        label_direct(
            axes, f"budget {budget_bytes / factor:.4g} {unit}", (-0.55, budget_bytes / factor),
            offset=(0, 4), color=RED,
        )  # fmt: skip
    axes.set_ylabel(f"peak memory ({unit})")
    axes.set_ylim(0, 1.22 * axes.get_ylim()[1])
    axes.grid(axis="y")
    legend_above(axes)


def _values(axes: Axes, steps: Sequence[Step], metric: Metric) -> None:
    points = [(n, step.probe.value, step.kept) for n, step in enumerate(steps)]
    kept = [(n, value) for n, value, keep in points if keep and value is not None]
    others = [(n, value) for n, value, keep in points if not keep and value is not None]
    if kept:
        axes.plot(*zip(*kept, strict=True), "o-", color=GREEN, linewidth=1.4, label="kept")
    if others:
        axes.plot(
            *zip(*others, strict=True), "o", color=GREY, markerfacecolor="white", label="not kept"
        )
    for number, value in [*kept, *others]:
        text = metric_text(metric, value)
        label_direct(axes, text, (number, value), offset=(0, 7), ha="center")
    for number, step in enumerate(steps):
        if step.probe.value is None:
            outcome = step.probe.outcome
            axes.annotate(
                "not run: " * (outcome is Outcome.predicted_over) + outcome.words, (number, 0.5),
                rotation=90, color=RED,
                xycoords=("data", "axes fraction"), ha="center", va="center", fontsize=8,
            )  # fmt: skip
    metric_axis(axes, metric)
    axes.margins(y=0.25)
    axes.grid(axis="y")
    legend_above(axes)


def _columns(metric: Metric) -> tuple[str, ...]:
    return (
        "step", "change", "kept", "predicted", "measured", metric_words(metric), "time", "why",
    )  # fmt: skip


def _cells(step: Step, metric: Metric) -> tuple[str, ...]:
    probe = step.probe
    return (
        str(step.number),
        step.change or START,
        "yes" if step.kept else "no",
        "-" if probe.predicted_peak_bytes is None else format_bytes(probe.predicted_peak_bytes),
        "-" if probe.demand_bytes is None else format_bytes(probe.demand_bytes),
        metric_text(metric, probe.value) or "-",
        "-" if probe.seconds is None else format_seconds(probe.seconds),
        step.reason,
    )


def _tick(step: Step) -> str:
    if step.change is None:
        return START
    key, _, value = step.change.partition("=")
    name = key.rpartition(".")[2]
    words: Any = name.split("_")
    # At most two short lines for the name, and the value below it.
    half = (len(words) + 1) // 2
    lines = [name] if len(name) <= 11 else ["_".join(words[:half]) + "_", "_".join(words[half:])]
    return "\n".join([*(line for line in lines if line), value])
