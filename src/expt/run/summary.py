"""Tables and plots of stored runs: one run's result, several runs side by side, one history."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from expt.files import replace_atomically
from expt.result import RunResult
from expt.tables import print_table
from expt.units import GIB, counted, format_bytes, format_seconds

_AT_MINUTES = re.compile(r"test/mae_(\d+(?:\.\d+)?)min")


def print_result(result: RunResult, run_dir: Path) -> None:
    """Print the table of errors and memory that a run ends with."""
    metrics, memory = result.metrics, result.memory
    reached = f"{counted(result.epochs, 'epoch')}, {counted(result.steps, 'step')}"
    print(f"\n{result.status} ({result.stop_reason}) after {reached}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("validation MAE (best)", _figure(metrics.get("val/mae"), result.unit))
    for minutes in minutes_of([result]):
        table.add_row(f"test MAE, {minutes} min", _figure(metrics.get(f"test/mae_{minutes}min")))
    table.add_row(
        "test MAE, all steps", _figure(metrics.get("test/mae"), result.unit), style="bold"
    )
    table.add_row("test RMSE", _figure(metrics.get("test/rmse"), result.unit))
    mape = metrics.get("test/mape")
    table.add_row("test MAPE", "-" if mape is None else f"{100 * mape:.2f} %")
    predicted = memory.get("predicted_peak_bytes")
    if predicted is not None:
        table.add_row("predicted peak memory", format_bytes(predicted))
    table.add_row("peak allocated memory", format_bytes(memory["peak_allocated_bytes"]))
    if (error := memory.get("prediction_error")) is not None:
        table.add_row("prediction error", f"{100 * error:+.2f} %")
    if memory["peak_reserved_bytes"] is not None:
        table.add_row("peak reserved memory", format_bytes(memory["peak_reserved_bytes"]))
    table.add_row("time", format_seconds(result.seconds))
    print_table(table)
    print(f"memory measured by: {memory['meter']}" if memory["meter"] else "")
    print(f"files: {run_dir}")
    if result.status == "stopped":
        print(f"to go on: python -m expt trainer.resume={run_dir}")
    if result.tracking["uri"]:
        print(
            f"MLflow: {result.tracking['uri']}  run {result.tracking['run_id'] or 'not yet sent'}"
        )


def comparison_table(results: Mapping[str, RunResult]) -> Table:
    """Return runs side by side, one row each."""
    table = Table(box=box.SIMPLE_HEAD)
    minutes = minutes_of(results.values())
    for number, name in enumerate(columns(minutes)):
        table.add_column(name, justify="left" if number < 3 else "right")
    for name, result in results.items():
        table.add_row(*row(name, result, minutes))
    return table


def comparison_markdown(results: Mapping[str, RunResult]) -> str:
    """Return the same table as Markdown."""
    minutes = minutes_of(results.values())
    heads = columns(minutes)
    rows = [heads, *(row(name, result, minutes) for name, result in results.items())]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines) + "\n"


def minutes_of(results: Iterable[RunResult]) -> list[str]:
    """Return how far ahead the runs were tested, in minutes: ``["15", "30", "60"]``."""
    found = {
        match[1]
        for result in results
        for name, value in result.metrics.items()
        if value is not None and (match := _AT_MINUTES.fullmatch(name))
    }
    return sorted(found, key=float)


def columns(minutes: Sequence[str]) -> tuple[str, ...]:
    """Return the heads of a table of runs; one column holds the errors at all of `minutes`."""
    ahead = "/".join(minutes or ("15", "30", "60"))
    return ("job", "preset", "status", "val MAE", "test MAE", f"{ahead} min", "peak", "time")


def row(name: str, result: RunResult, minutes: Sequence[str]) -> tuple[str, ...]:
    """Return a run's cells for `columns`."""
    metrics = result.metrics
    horizons = (_figure(metrics.get(f"test/mae_{ahead}min")) for ahead in minutes)
    return (
        name,
        result.preset or "-",
        result.status,
        _figure(metrics.get("val/mae")),
        _figure(metrics.get("test/mae")),
        "/".join(horizons) or "-",
        format_bytes(result.memory["peak_allocated_bytes"]),
        format_seconds(result.seconds),
    )


def plot_history(
    history: Sequence[Mapping[str, float]], monitor: str, folder: Path, unit: str | None = None
) -> list[Path]:
    """Draw loss and validation over steps, and memory over steps; return the PNG files.

    `unit` is that of the errors (`RunResult.unit`); without one the axis says only what they are.
    """
    if not history:
        return []
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    steps = [row["step"] for row in history]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    losses.plot(steps, [row["loss"] for row in history], "o-", label="training loss")
    losses.plot(steps, [row["val"] for row in history], "o-", label=f"validation {monitor.upper()}")
    best = min(history, key=lambda row: row["val"])
    losses.axhline(best["val"], color="0.6", linewidth=0.8, linestyle=":")
    losses.annotate(
        f"best {best['val']:.3f}",
        (best["step"], best["val"]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="center",
        fontsize=9,
    )
    name = "MAE" if monitor == "mae" else monitor
    losses.set_ylabel(f"{name} ({unit})" if unit else name)
    losses.margins(x=0.08, y=0.2)
    losses.legend(frameon=False)
    labels = {
        "peak_allocated_bytes": "peak allocated",
        "peak_reserved_bytes": "peak reserved",
        "process_peak_bytes": "process (resident, peak)",
    }
    for name, label in labels.items():
        if all(name in row for row in history):
            memory.plot(steps, [row[name] / GIB for row in history], "o-", label=label)
    memory.set(ylabel="memory (GiB)", xlabel="optimizer step", ylim=(0, None))
    if memory.lines:
        memory.legend(frameon=False)
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "history.png"
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return [path]


def _figure(value: float | None, unit: str | None = None) -> str:
    return "-" if value is None else f"{value:.3f} {unit or ''}".rstrip()
