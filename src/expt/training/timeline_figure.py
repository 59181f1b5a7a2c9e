"""A timeline of memory as a picture: what was allocated, by category, through a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expt.files import replace_atomically
from expt.memory.measuring.timeline import Timeline
from expt.memory.measuring.timeline_sums import MemorySums, Moment, moments
from expt.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "parameters": "#0072B2",
    "optimizer_state": "#56B4E9",
    "inputs": "#999999",
    "other": "#dddddd",
    "gradients": "#009E73",
    "activations": "#E69F00",
    "temporaries": "#D55E00",
    "workspaces": "#CC79A7",
}
"""From the bottom: what stays, then what comes and goes (colours of Okabe and Ito, 2008)."""
SHADES = {
    "batch": "#bdbdbd",
    "forward": "#cfe3f1",
    "loss": "#7fb2d6",
    "backward": "#fbe3bd",
    "optimizer_step": "#c4e6d9",
    "evaluation": "#e8d5e3",
    "between": "#f2f2f2",
}
LABELS = {"optimizer_step": "optimizer"}
COLUMNS = 800
"""Of the picture, each a little wider than a dot, so that what lasted for less is seen."""
LEAST_LABELLED = 0.065
"""Share of the width from which on a phase's name fits into it."""
LEAST_DRAWN = 0.002
"""Share of the peak below which a category cannot be seen, and is left out."""
Column = tuple[float, Moment]
"""Where something begins, as a share of the picture's width, and what is allocated from there."""
INK, GREY = "#222222", "#767676"


def draw_timeline(
    timeline: Timeline, sums: MemorySums, predicted_bytes: int | None, path: Path
) -> None:
    """Write the picture: a stack of categories, phases above it, the peak, and the prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 13))
    seen = list(moments(timeline))
    begin = seen[0].at_ns
    end = max(timeline.segments[-1].end_ns, seen[-1].at_ns)
    unit, factor = ("GiB", GIB) if sums.peak_bytes >= GIB / 2 else ("MiB", MIB)
    _stack(axes, by_column(seen, begin, end), sums, (end - begin) / 1e6, factor)
    _mark(axes, seen, sums, predicted_bytes, begin, factor)
    _strip(strip, timeline, begin, end)
    for start in timeline.steps:
        if start > begin:
            axes.axvline((start - begin) / 1e6, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="time under the profiler (ms)", ylabel=f"allocated ({unit})")
    axes.set_xlim(0, (end - begin) / 1e6)
    axes.spines[["top", "right"]].set_visible(False)
    replace_atomically(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=130), durable=False
    )


def by_column(seen: Sequence[Moment], begin: int, end: int) -> list[Column]:
    """Return what to draw from where on: in a column its highest moment, then its last."""
    inside: dict[int, list[Moment]] = {}
    for moment in seen:
        place = COLUMNS * (moment.at_ns - begin) // max(end - begin, 1)
        inside.setdefault(min(place, COLUMNS - 1), []).append(moment)
    found: list[Column] = []
    for place, here in inside.items():
        carried = [found[-1][1]] if found else []
        if found and found[-1][0] == place / COLUMNS:
            found.pop()
        highest = max([*carried, *here], key=lambda moment: moment.bytes)
        found += [(place / COLUMNS, highest), ((place + 1) / COLUMNS, here[-1])]
    return found


def _stack(
    axes: Axes, columns: Sequence[Column], sums: MemorySums, width_ms: float, factor: int
) -> None:
    kept = [moment for _, moment in columns]
    shown = [
        name for name in COLOURS
        if max(moment.by_category.get(name, 0) for moment in kept) >= LEAST_DRAWN * sums.peak_bytes
    ]  # fmt: skip
    times = [share * width_ms for share, _ in columns] + [width_ms]
    heights = [
        [moment.by_category.get(name, 0) / factor for moment in [*kept, kept[-1]]] for name in shown
    ]
    labels = [f"{name.replace('_', ' ')} {format_bytes(sums.by_category[name])}" for name in shown]
    axes.stackplot(
        times, heights, labels=labels, colors=[COLOURS[name] for name in shown], step="post",
        linewidth=0,
    )  # fmt: skip
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], title="at the peak", loc="upper left",
        bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, title_fontsize=9, alignment="left",
    )  # fmt: skip


def _mark(
    axes: Axes, seen: Sequence[Moment], sums: MemorySums, predicted: int | None, begin: int,
    factor: int,
) -> None:  # fmt: skip
    """Mark the peak and draw the prediction, with words that keep out of each other's way."""
    peak = max(seen, key=lambda moment: moment.bytes)
    at, height = (peak.at_ns - begin) / 1e6, peak.bytes / factor
    top = max(peak.bytes, predicted or 0) / factor
    axes.set_ylim(0, 1.2 * top)
    left = (peak.at_ns - begin) > (seen[-1].at_ns - begin) / 2
    axes.plot([at], [height], "o", color=INK, markersize=5, zorder=5)
    axes.annotate(
        f"peak {format_bytes(peak.bytes)}, {LABELS.get(sums.peak_phase, sums.peak_phase)}: "
        f"{sums.peak_operator}",
        (at, height), xytext=(at, 1.13 * top), ha="right" if left else "left", fontsize=9,
        color=INK, arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8},
    )  # fmt: skip
    if predicted is not None:
        axes.axhline(predicted / factor, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            f"predicted {format_bytes(predicted)}", (0 if left else 1, predicted / factor),
            xycoords=("axes fraction", "data"), xytext=(4 if left else -4, 4),
            textcoords="offset points", ha="left" if left else "right", fontsize=9, color=INK,
        )  # fmt: skip


def _strip(axes: Axes, timeline: Timeline, begin: int, end: int) -> None:
    """Show the phases as bands, with their names where these fit."""
    unnamed = set()
    for part in timeline.segments:
        start, stop = max(part.start_ns, begin), min(part.end_ns, end)
        if stop <= start:
            continue
        axes.axvspan(
            (start - begin) / 1e6, (stop - begin) / 1e6, color=SHADES.get(part.phase, "#f2f2f2"),
            linewidth=0,
        )  # fmt: skip
        name = LABELS.get(part.phase, part.phase)
        if stop - start >= LEAST_LABELLED * (end - begin):
            middle = (start + stop) / 2 - begin
            axes.text(middle / 1e6, 0.5, name, ha="center", va="center", fontsize=8, color=INK)
        elif stop - start > (end - begin) / 400:
            unnamed.add(part.phase)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    if unnamed:
        from matplotlib.patches import Patch

        axes.legend(
            handles=[
                Patch(color=shade, label=LABELS.get(name, name))
                for name, shade in SHADES.items()
                if name in unnamed
            ],
            loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, ncols=2,
            columnspacing=1.0, handlelength=1.0,
        )  # fmt: skip
