"""Tables and plots of stored runs: one run's result, several runs side by side, one history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from expt.files import replace_atomically
from expt.job import Metric
from expt.result import RunResult
from expt.tables import markdown_table, print_table
from expt.units import GIB, counted, format_bytes, format_seconds

CONSOLE_METRICS = 5


def print_result(result: RunResult, run_dir: Path) -> None:
    """Print the table of errors and memory that a run ends with."""
    memory = result.memory
    reached = f"{counted(result.epochs, 'epoch')}, {counted(result.steps, 'step')}"
    print(f"\n{result.status} ({result.stop_reason}) after {reached}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("value", justify="right")
    best = result.metric()
    table.add_row(f"validation {best.label} (best)", best.text(result.value()))
    for metric, value in tested(result):
        monitored = metric.name == result.monitor
        style = "bold" if monitored else None
        table.add_row(f"test {metric.label}", metric.text(value), style=style)
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
    """Return runs side by side, one row each, with as many metrics as a console has room for."""
    table = Table(box=box.SIMPLE_HEAD)
    heads, *rows = compared(results, CONSOLE_METRICS)
    for number, name in enumerate(heads):
        table.add_column(name, justify="left" if number < 3 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def comparison_markdown(results: Mapping[str, RunResult]) -> str:
    """Return the same table as Markdown, with all metrics."""
    return markdown_table(compared(results))


def compared(results: Mapping[str, RunResult], most: int | None = None) -> list[list[str]]:
    """Return runs side by side as cells, the heads first; a column for each of `most` metrics."""
    metrics: dict[str, Metric] = {}
    for result in results.values():
        metrics.setdefault(f"val/{result.monitor}", result.metric())
        for metric, _ in tested(result):
            metrics.setdefault(f"test/{metric.name}", metric)
    names = sorted(metrics, key=lambda name: name.startswith("test/"))[:most]
    monitored = {result.monitor for result in results.values()}
    heads = [
        f"{name.partition('/')[0]} {metric.label}" if metric.name in monitored else metric.label
        for name, metric in ((name, metrics[name]) for name in names)
    ]
    rows = [["job", "preset", "status", *heads, "peak", "time"]]
    for job, result in results.items():
        cells = [metrics[name].text(result.metrics.get(name), unit=False) for name in names]
        peak = format_bytes(result.memory["peak_allocated_bytes"])
        time = format_seconds(result.seconds)
        rows.append([job, result.preset or "-", result.status, *cells, peak, time])
    return rows


def tested(result: RunResult) -> list[tuple[Metric, float | None]]:
    """Return what the test measured; of what there is nothing of, only the monitored figure."""
    described = [Metric.from_dict(stored) for stored in result.metrics_meta] or [
        result.metric(name) for name in result.metrics if name.startswith("test/")
    ]
    values = [(metric, result.metrics.get(f"test/{metric.name}")) for metric in described]
    return [
        (metric, value)
        for metric, value in values
        if value is not None or metric.name == result.monitor
    ]


def plot_history(
    history: Sequence[Mapping[str, float]], monitor: Metric, folder: Path
) -> list[Path]:
    """Draw loss and validation over steps, and memory over steps; return the PNG files."""
    if not history:
        return []
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    steps = [row["step"] for row in history]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    losses.plot(steps, [row["loss"] for row in history], "o-", label="training loss")
    losses.plot(steps, [row["val"] for row in history], "o-", label=f"validation {monitor.label}")
    best = min(history, key=lambda row: monitor.cost(row["val"]))
    losses.axhline(best["val"], color="0.6", linewidth=0.8, linestyle=":")
    losses.annotate(
        f"best {monitor.text(best['val'], unit=monitor.percent)}",
        (best["step"], best["val"]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="center",
        fontsize=9,
    )
    losses.set_ylabel(monitor.axis())
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
