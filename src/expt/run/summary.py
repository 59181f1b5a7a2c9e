"""Tables and plots of stored runs: one run's result, several runs side by side, one history."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich import box
from rich.table import Table

from expt.config.compose import typed
from expt.files import replace_atomically
from expt.job import Metric
from expt.result import RunResult
from expt.tables import markdown_table, print_table
from expt.units import GIB, counted, format_bytes, format_seconds

CONSOLE_METRICS = 5
PARTIAL = "*"
"""Marks a figure that is of a part of its split only."""
NO_SETTINGS: Mapping[str, Mapping[str, str]] = MappingProxyType({})


def print_result(result: RunResult, run_dir: Path) -> None:
    """Print the table of errors and memory that a run ends with."""
    memory = result.memory
    reached = f"{counted(result.epochs, 'epoch')}, {counted(result.steps, 'step')}"
    print(f"\n{result.status} ({result.stop_reason}) after {reached}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("value", justify="right")
    best = result.metric()
    marks = dict.fromkeys(result.partial, f" {PARTIAL}")
    val = f"validation {best.label} (best){marks.get('val', '')}"
    table.add_row(val, best.text(result.value()))
    for metric, value in tested(result):
        monitored = metric.name == result.monitor
        style = "bold" if monitored else None
        label = f"test {metric.label}{marks.get('test', '')}"
        table.add_row(label, metric.text(value), style=style)
    predicted = memory.get("predicted_peak_bytes")
    if predicted is not None:
        table.add_row("predicted peak memory", format_bytes(predicted))
    table.add_row("peak allocated memory", format_bytes(memory["peak_allocated_bytes"]))
    if (error := memory.get("prediction_error")) is not None:
        table.add_row("prediction error", f"{100 * error:+.2f} %")
    for one in result.stages or ():
        from expt.run.stages import epochs_of

        measured = one["peak_allocated_bytes"]
        table.add_row(
            f"stage of {epochs_of(one['first_epoch'], one['last_epoch'])}: predicted, measured",
            f"{format_bytes(one['predicted_peak_bytes'])}, "
            + ("-" if measured is None else format_bytes(measured)),
        )
    if memory["peak_reserved_bytes"] is not None:
        table.add_row("peak reserved memory", format_bytes(memory["peak_reserved_bytes"]))
    table.add_row("time", format_seconds(result.seconds))
    print_table(table)
    for words in partial_words(result):
        print(f"{PARTIAL} of a part only: {words}")
    print(f"memory measured by: {memory['meter']}" if memory["meter"] else "")
    print(f"files: {run_dir}")
    if result.status == "stopped":
        print(f"to go on: python -m expt {typed('trainer.resume', run_dir)}")
    if result.tracking["uri"]:
        print(
            f"MLflow: {result.tracking['uri']}  run {result.tracking['run_id'] or 'not yet sent'}"
        )
        if (link := runs_link(result)) is not None:
            print(link)


def runs_link(result: RunResult) -> str | None:
    """Return where MLflow shows the table of runs that this one is in; None if it is not known."""
    uri, experiment = str(result.tracking["uri"]), result.tracking.get("experiment_id")
    if experiment is None:
        return None
    page = f"#/experiments/{experiment}/runs"
    if uri.startswith(("http://", "https://")):
        return f"runs: {uri.rstrip('/')}/{page}"
    server = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    return f"runs: http://127.0.0.1:5000/{page}  while this runs: {server}"


def comparison_table(
    results: Mapping[str, RunResult], settings: Mapping[str, Mapping[str, str]] = NO_SETTINGS
) -> Table:
    """Return runs side by side, one row each, with as many metrics as a console has room for."""
    table = Table(box=box.SIMPLE_HEAD)
    heads, *rows = compared(results, CONSOLE_METRICS, settings)
    text = heads.index("status") + 1
    for number, name in enumerate(heads):
        table.add_column(name, justify="left" if number < text else "right")
    for row in rows:
        table.add_row(*row)
    return table


def comparison_markdown(
    results: Mapping[str, RunResult], settings: Mapping[str, Mapping[str, str]] = NO_SETTINGS
) -> str:
    """Return the same table as Markdown, with all metrics, and what is to be known about it."""
    notes = comparison_notes(results)
    return markdown_table(compared(results, None, settings)) + "".join(f"\n{n}\n" for n in notes)


def comparison_notes(results: Mapping[str, RunResult]) -> list[str]:
    """Return why runs failed, and which figures are of a part of their split."""
    notes = [
        f"{job}: {result.stop_reason}"
        for job, result in results.items()
        if result.status == "failed"
    ]
    parts = {words for result in results.values() for words in partial_words(result)}
    return notes + [f"{PARTIAL} of a part only: {words}" for words in sorted(parts)]


def partial_words(result: RunResult) -> list[str]:
    """Return of which splits only a part was evaluated, in words."""
    return [f"{split} {words} (trainer.eval_batches)" for split, words in result.partial.items()]


def compared(
    results: Mapping[str, RunResult],
    most: int | None = None,
    settings: Mapping[str, Mapping[str, str]] = NO_SETTINGS,
) -> list[list[str]]:
    """Return runs side by side as cells, the heads first.

    Args:
        results: by job.
        most: how many metrics get a column; None: all.
        settings: by job, those that vary among the jobs; each gets a column.

    """
    metrics: dict[str, Metric] = {}
    described = {job: result for job, result in results.items() if result.metrics}
    for result in (described or results).values():
        metrics.setdefault(f"val/{result.monitor}", result.metric())
        for metric, _ in tested(result):
            metrics.setdefault(f"test/{metric.name}", metric)
    names = sorted(metrics, key=lambda name: name.startswith("test/"))[:most]
    monitored = {result.monitor for result in results.values()}
    heads = [
        f"{name.partition('/')[0]} {metric.label}" if metric.name in monitored else metric.label
        for name, metric in ((name, metrics[name]) for name in names)
    ]
    varied = list(dict.fromkeys(name for own in settings.values() for name in own))
    last = [name.rpartition(".")[2] for name in varied]
    shown = [name if last.count(own) > 1 else own for name, own in zip(varied, last, strict=True)]
    rows = [["job", "preset", *shown, "status", *heads, "peak", "time"]]
    for job, result in results.items():
        cells = [
            metrics[name].text(result.metrics.get(name), unit=False)
            + (f" {PARTIAL}" if name.partition("/")[0] in result.partial else "")
            for name in names
        ]
        peak = format_bytes(result.memory["peak_allocated_bytes"])
        time = format_seconds(result.seconds)
        own = [settings.get(job, {}).get(name, "-") for name in varied]
        rows.append([job, result.preset or "-", *own, result.status, *cells, peak, time])
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
    """Draw loss and validation over steps, and memory over steps; return the PNG files.

    The two share an axis where the metric is the loss, or an error in a unit, as the loss is then.
    """
    if not history:
        return []
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    steps = [row["step"] for row in history]
    shared = monitor.name == "loss" or (monitor.goal == "min" and monitor.unit != "")
    heights = (3, 2) if shared else (3, 2, 2)
    figure = Figure(figsize=(8, 6 if shared else 7.5), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    validation, losses, memory = panels[0], panels[-2], panels[-1]
    losses.plot(steps, [row["loss"] for row in history], "o-", label="training loss")
    validation.plot(
        steps, [row["val"] for row in history], "o-", color="tab:orange",
        label=f"validation {monitor.label}",
    )  # fmt: skip
    best = min(history, key=lambda row: monitor.cost(row["val"]))
    validation.axhline(best["val"], color="0.6", linewidth=0.8, linestyle=":")
    validation.annotate(
        f"best {monitor.text(best['val'], unit=monitor.percent)}",
        (best["step"], best["val"]),
        textcoords="offset points",
        xytext=(0, 8 if monitor.goal == "max" else -14),
        ha="center",
        fontsize=9,
    )
    losses.set_ylabel("loss")
    validation.set_ylabel(monitor.axis())
    if monitor.percent:
        validation.yaxis.set_major_formatter(lambda value, _: monitor.tick(value))
    for axes in panels[:-1]:
        axes.margins(x=0.08, y=0.2)
        axes.legend(frameon=False)
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
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "history.png"
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return [path]
