"""What `peers.py` writes: a table for each series, and the picture of errors over memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common import RESULTS, markdown, source_line
from peers_rows import MINUTES, PEERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MIB = 2**20
COLUMNS = (
    "model", "parameters", "batch", "predicted, CPU / CUDA", "measured", "CPU ms a step",
    "15 / 30 / 60 min", "test MAE", "val MAE", "steps (epochs)", "CPU min",
)  # fmt: skip
FAR = 1.2
"""Times the best error; what is above would leave no room for the differences below."""
PLACES = (
    ((6, 5), "left"), ((6, -12), "left"), ((-6, 5), "right"), ((-6, -12), "right"),
    ((0, 8), "center"), ((0, -16), "center"), ((-4, 13), "left"), ((4, 13), "right"),
)  # fmt: skip
"""Where a name may stand, in points from its point, and how it is aligned there."""
HORIZONS = ("test/mae_15min", "test/mae_30min", "test/mae_60min")


def tables(record: Mapping[str, Any]) -> str:
    """Return the page's tables, of every series that has rows."""
    parts = []
    for data, costs in record["costs"].items():
        if not costs:
            continue
        sensors = next(iter(costs.values()))["sensors"]
        lines = [line(record, data, name) for name in PEERS if name in costs]
        parts.append(f"`{data}`, {sensors} sensors:\n\n" + markdown(COLUMNS, lines))
        waiting = [name for name in PEERS if name not in costs]
        if waiting:
            parts.append(f"Not measured yet: {', '.join(waiting)}.\n")
    note = (
        f"Every seed is trained for {MINUTES:g} minutes of CPU time (one thread) or until its own "
        "settings end it, with the sizes, batches and rates of its paper, or of "
        "`experiment=accuracy` for ours; the schedule of the rate is laid over the steps that "
        "fit. Errors are masked MAE in mph over the whole set; a test figure is that of the best "
        "weights by validation, once a seed is finished, and the mean over finished seeds. Peaks "
        "are of a training step or an evaluation batch, the higher one, predicted beforehand and "
        "measured on the CPU; the CUDA figure is predicted only.\n\n"
    )
    return "\n".join(parts) + "\n" + note + source_line(record, "peers")


def line(record: Mapping[str, Any], data: str, name: str) -> tuple[str, ...]:
    """Return a model's line."""
    cost = record["costs"][data][name]
    runs = [run for run in record["rows"][data].values() if run["model"] == name]
    done = [run for run in runs if run["finished"]]
    seeds = PEERS[name].seeds
    return (
        name,
        count(cost["parameters"]),
        str(cost["batch_size"]),
        f"{cost['predicted_bytes'] / MIB:.1f} / {cost['predicted_cuda_bytes'] / MIB:.1f} MiB",
        f"{cost['measured_bytes'] / MIB:.1f} MiB",
        milliseconds(cost["step_seconds"]),
        " / ".join(f"{mean(done, key):.2f}" for key in HORIZONS) if done else "-",
        tested(done, len(seeds)),
        validated(runs),
        ", ".join(map(progress, runs)) or "-",
        "/".join(f"{run['cpu_seconds'] / 60:.1f}" for run in runs) or "-",
    )


def tested(done: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """Return the test error of the seeds that are finished, and how many are not."""
    if not done:
        return "unfinished"
    values = [run["metrics"]["test/mae"] for run in done]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    left = f" ({len(done)} of {seeds} seeds)" if len(done) < seeds else ""
    return f"{statistics.mean(values):.3f}{spread}{left}"


def validated(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the best validation errors so far, of seeds that have validated."""
    values = [run["metrics"]["val/mae"] for run in runs if run.get("metrics")]
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    so_far = "" if all(run["finished"] for run in runs) else " so far"
    return f"{statistics.mean(known):.3f}{so_far}"


def progress(run: Mapping[str, Any]) -> str:
    """Return how far a seed is: its steps, of how many if it goes on, and its epochs."""
    left = "" if run["finished"] else f" of {run['steps_planned']:,}"
    return f"{run.get('steps', 0):,}{left} ({run.get('epochs', 0)})"


def mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(run["metrics"][key] for run in runs)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.01 else f"{1000 * seconds:.1f}"


def count(parameters: int) -> str:
    return f"{parameters / 1e3:,.0f} K" if parameters >= 1000 else str(parameters)


def name_points(axes: Axes, drawn: Sequence[tuple[float, float, str]]) -> None:
    """Write each name where it covers the fewest points and names that stand already."""
    from matplotlib.transforms import Bbox

    from expt.reports.figures.style import BLUE, ORANGE, label_direct

    axes.get_figure(root=True).draw_without_rendering()
    corners = axes.transData.transform([(peak, error) for peak, error, _ in drawn])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in corners]
    for peak, error, name in drawn:
        colour = BLUE if PEERS[name].ours else ORANGE
        tried = []
        for offset, side in PLACES:
            text = label_direct(axes, name, (peak, error), offset, color=colour, ha=side)
            box = text.get_window_extent()
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1)
            tried.append((outside + sum(box.overlaps(other) for other in taken), text, box))
        _, best, box = min(tried, key=lambda one: one[0])
        taken.append(box)
        for _, text, _ in tried:
            if text is not best:
                text.remove()


def plot(record: Mapping[str, Any]) -> None:
    """Draw test error over measured peak of what is finished, the series one below the other."""
    from matplotlib.figure import Figure

    from expt.files import replace_atomically
    from expt.reports.figures.style import look

    drawn = [data for data, costs in record["costs"].items() if costs]
    with look():
        figure = Figure(figsize=(7, 4.6 * len(drawn)), layout="constrained")
        parts = figure.subfigures(len(drawn), squeeze=False)[:, 0]
        for part, data in zip(parts, drawn, strict=True):
            draw_series(part, data, record["costs"][data], record["rows"][data].values())
        replace_atomically(
            RESULTS / "peers.png",
            lambda temporary: figure.savefig(temporary, format="png", dpi=120),
        )


def draw_series(
    figure: SubFigure, data: str, costs: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]
) -> None:
    """Draw the points of a series.

    What is unfinished is a tick in a strip below; errors far above the best stand in words.
    """
    from expt.reports.figures.style import BLUE, GREY, ORANGE, plain_log

    done = [run for run in runs if run["finished"]]
    errors = {
        name: mean(own, "test/mae")
        for name in costs
        if (own := [run for run in done if run["model"] == name])
    }
    highest = FAR * min(errors.values(), default=0.0)
    drawn = sorted(
        (costs[name]["measured_bytes"] / MIB, error, name)
        for name, error in errors.items()
        if error <= highest
    )
    above = [f"{name} {error:.2f}" for name, error in errors.items() if error > highest]
    unfinished = [name for name in costs if name not in errors]
    if unfinished:
        axes, strip = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        plain_log(strip, "x")
        strip.set(ylim=(-0.3, 1.5), yticks=[])
        strip.set_ylabel("unfinished", fontsize=8)
    else:
        axes = strip = figure.subplots()
    plain_log(axes, "x")
    for name in unfinished:
        peak = costs[name]["measured_bytes"] / MIB
        colour = BLUE if PEERS[name].ours else ORANGE
        strip.plot(peak, 0.0, "|", color=colour, markersize=9)
        strip.annotate(
            name, (peak, 0.0), xytext=(2, 5), textcoords="offset points", rotation=35,
            fontsize=7, color=GREY,
        )  # fmt: skip
    for peak, error, name in drawn:
        axes.plot(peak, error, "o", color=BLUE if PEERS[name].ours else ORANGE)
    axes.margins(x=0.2, y=0.25)
    axes.set(
        ylabel="test MAE (mph)",
        title=f"{data}: error over memory, ours in blue, the field's in orange",
    )
    strip.set_xlabel("measured peak on the CPU (MiB)")
    if above:
        words = f"above: {', '.join(above)}"
        axes.text(0.01, 0.97, words, fontsize=8, va="top", transform=axes.transAxes)
    axes.grid(axis="y")
    name_points(axes, drawn)
