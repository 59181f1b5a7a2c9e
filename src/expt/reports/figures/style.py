"""How every figure looks: sizes, colours, the unit of an axis, and how it is written to a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expt.files import replace_atomically
from expt.job import Metric
from expt.reports.records import metric_words
from expt.units import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
"""Told apart by everybody (Okabe and Ito, Color Universal Design, 2008)."""
INK, GREY, PALE = "#222222", "#767676", "#dddddd"
WIDTH_INCHES = 6.4
DOTS_PER_INCH = 200

_SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
    "pdf.fonttype": 42,
}


@contextmanager
def look() -> Iterator[None]:
    """Draw in the house's look inside."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def draw(
    folder: Path, name: str, height_inches: float, onto: Callable[[Figure], None]
) -> list[Path]:
    """Let `onto` fill a figure; write it as ``name.png`` and ``name.pdf``, return both paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells which glyphs it keeps
    with look():
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasAgg(figure)
        onto(figure)
        paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
        for path in paths:
            # A PDF with its date in it would differ from run to run.
            extra: dict[str, Any] = (
                {"metadata": {"CreationDate": None}} if path.suffix == ".pdf" else {}
            )

            def save(temporary: Path, kind: str = path.suffix[1:], more: Any = extra) -> None:
                figure.savefig(temporary, format=kind, dpi=DOTS_PER_INCH, **more)

            replace_atomically(path, save, durable=False)
    return paths


def byte_unit(counts: Iterable[int | None]) -> tuple[str, int]:
    """Return the unit, by name and in bytes, in which these are read best."""
    largest = max((count for count in counts if count is not None), default=0)
    return ("GiB", GIB) if largest >= GIB / 2 else ("MiB", MIB)


def plain_log(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 that are written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def metric_axis(axes: Axes, metric: Metric) -> None:
    """Name the upright axis after a metric: ``validation MAE (mph)``; per cent as per cent."""
    axes.set_ylabel(replace(metric, label=metric_words(metric)).axis())
    if metric.percent:
        axes.yaxis.set_major_formatter(lambda value, _: metric.tick(value))


def without_outliers(axes: Axes, values: Sequence[float], metric: Metric, reach: float) -> int:
    """Keep a few bad values from squeezing all others into one line; return how many are outside.

    Args:
        axes: whose upright axis is cut.
        values: that are drawn.
        metric: says which way is bad.
        reach: how many times as far from the best as the median a value may be.

    """
    costs = sorted(map(metric.cost, values))
    best, middle = costs[0], costs[len(costs) // 2]
    worst = best + reach * (middle - best)
    if not best < worst < costs[-1]:
        return 0
    edges = best - 0.07 * (worst - best), worst
    axes.set_ylim(*sorted(metric.cost(edge) for edge in edges))
    return sum(cost > worst for cost in costs)


def whole_numbers(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend_above(axes: Axes) -> None:
    """Put a legend of one row above the axes, if there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(
            handles,
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(handles),
            columnspacing=1.1,
            handletextpad=0.4,
            handlelength=1.5,
        )


def label_direct(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float] = (6, 5),
    **more: Any,
) -> Annotation:
    """Write a word beside a point, in points of distance, with a halo so that lines may cross."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    return axes.annotate(
        text,
        at,
        textcoords="offset points",
        xytext=offset,
        fontsize=more.pop("fontsize", 8),
        path_effects=halo,
        **more,
    )
