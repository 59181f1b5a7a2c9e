"""Tables and plots of `benchmarks/gpu.py`'s record; a cell without a figure says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import RESULTS, markdown, source_line
from gpu_record import GROUPS

PRESETS = ("minimal", "lite", "full")
ABSENT = "not measured"
MIB = 1024**2
Record = dict[str, Any]


def tables(record: Record) -> str:
    """Return the page's tables; without a measurement, only that there is none."""
    if "made" not in record:
        return "Not measured: it takes a CUDA device and `python benchmarks/gpu.py --minutes 20`.\n"
    parts = [
        "Training steps at 207 sensors, batch of the preset:\n",
        markdown(
            (
                "preset", "eager, ms", "captured, ms", "compiled, ms", "captured, windows/s",
                "floor, ms", "captured / floor", "peak, MiB", "reserved, MiB",
            ),
            [step_row(record, preset) for preset in PRESETS],
        ),
        "Whole loops, windows/s (median of rounds that alternate):\n",
        markdown(
            ("preset", "ours", "DataLoader loop", "Trainer", "ours / loop", "ours / Trainer"),
            [loop_row(record, preset) for preset in PRESETS],
        ),
    ]  # fmt: skip
    return "\n".join([*parts, source_line(record, "gpu")])


def details(record: Record) -> str:
    """Return the other tables: accuracy, and what was checked; "" without a measurement."""
    if "made" not in record:
        return ""
    parts = [
        "Accuracy, test MAE in mph (whole set, masked, best by validation):\n",
        markdown(
            ("model", "data", "seeds", "test MAE", "val MAE", "epochs", "s/epoch"),
            accuracy_rows(record),
        ),
        markdown(("check", "result"), check_rows(record)),
    ]
    return "\n".join(parts)


def all_details(record: Record) -> str:
    """Return the details of the group measured last, and every table of the groups before it."""
    (name, shown), *older = [*record.get(GROUPS, {}).items()][::-1] or [("", {})]
    text = details(shown) + (f"\nMeasured with {name}.\n" if name else "")
    for other, sections in older:
        text += f"\n## Earlier: {other}\n\n{tables(sections)}\n{details(sections)}"
    return text


def figure(record: Record, section: str, item: str, key: str) -> Any:
    """Return a figure, or None."""
    return record.get(section, {}).get(item, {}).get(key)


def step_row(record: Record, preset: str) -> tuple[str, ...]:
    def of(how: str, key: str) -> float | None:
        item = f"{preset}, bf16, {how}"
        captured = figure(record, "steps", item, "captured")
        if how != "off" and (captured is False or figure(record, "steps", item, "said")):
            return None  # it fell back to eager steps, or did not compile, and its row says why
        found: float | None = figure(record, "steps", item, key)
        return found

    def ms(how: str) -> float | None:
        found = of(how, "seconds_per_step")
        return None if found is None else 1e3 * found

    floor = figure(record, "floors", f"{preset}, bf16", "floor_seconds")
    captured = ms("graph")
    ratio = None if floor is None or captured is None else captured / (1e3 * floor)
    return (
        f"{preset}, bf16",
        number(ms("off"), "{:.2f}"),
        number(captured, "{:.2f}"),
        number(ms("compile"), "{:.2f}"),
        number(of("graph", "windows_per_second"), "{:.0f}"),
        number(None if floor is None else 1e3 * floor, "{:.2f}"),
        number(ratio, "x{:.1f}"),
        mib(of("graph", "peak_allocated_bytes")),
        mib(of("graph", "peak_reserved_bytes")),
    )


def loop_row(record: Record, preset: str) -> tuple[str, ...]:
    row = record.get("loops", {}).get(preset, {})

    def windows(name: str) -> str:
        if row and "error" not in row and name not in row:
            return "failed" if name in row.get("failed", {}) else "not installed"
        return number(row.get(name, {}).get("windows_per_second"), "{:.0f}")

    def over(name: str) -> str:
        ratio = row.get(name, {}).get("ours_over_it")
        return number(None if not ratio else 1 / ratio, "x{:.1f}")

    names = ("ours", "bare loop", "lightning")
    return (preset, *map(windows, names), *map(over, names[1:]))


def accuracy_rows(record: Record) -> list[tuple[str, ...]]:
    runs = [row for row in record.get("accuracy", {}).values() if row.get("done")]
    rows = []
    for model, data in dict.fromkeys((run["model"], run["data"]) for run in runs):
        same = [run for run in runs if (run["model"], run["data"]) == (model, data)]

        def mean(key: str, same: list[Record] = same) -> float:
            return sum(run["metrics"][key] for run in same) / len(same)

        spans = [run["seconds_per_epoch"] for run in same if run["seconds_per_epoch"]]
        rows.append(
            (
                model, data, str(len(same)), f"{mean('test/mae'):.3f}", f"{mean('val/mae'):.3f}",
                "/".join(str(run["epochs"]) for run in same),
                number(sum(spans) / len(spans) if spans else None, "{:.1f}"),
            )
        )  # fmt: skip
    return rows or [("lite, full, stid", "metr_la_29", "-", *(ABSENT,) * 4)]


def check_rows(record: Record) -> list[tuple[str, str]]:
    rows = []
    for item, row in record.get("correctness", {}).items():
        distance = row.get("weights_distance")
        if distance is not None:
            eager = " (nothing was captured)" if row.get("captured") is False else ""
            eager = eager or (" (not as asked for; its row says why)" if row.get("said") else "")
            name = f"{item}: distance of weights after {row['steps']} steps"
            rows.append((name, f"{distance:.1e}{eager}"))
    waits = record.get("correctness", {}).get("no waiting")
    if waits:
        told = "none" if waits.get("checked") else "not checked: no CUDA"
        rows.append(("waits for the device inside an epoch", waits.get("error", told)))
    for item, row in record.get("recovery", {}).items():
        if "events" in row:
            rungs = ", ".join(str(event["rung"]) for event in row["events"]) or "none needed"
            text = f"{rungs}; distance of weights {row['weights_distance']:.1e}"
            rows.append((f"{item} in a budget of {mib(row['budget_bytes'])} MiB", text))
    for item, row in record.get("memory", {}).items():
        if "predicted_bytes" in row:
            gap = row["predicted_bytes"] / row["measured_bytes"] - 1
            rows.append((f"{item}: predicted against measured peak", f"{100 * gap:+.1f} %"))
    return rows or [("fast path against eager, recovery, prediction", ABSENT)]


DRAWN = ("steps", "accuracy")
"""Sections that `draw` shows."""


def draw(record: Record, folder: Path | None) -> None:
    """Draw windows/s by preset, and validation MAE over time, where there are figures."""
    from matplotlib.figure import Figure

    from expt.files import replace_atomically

    bars = {
        how: [
            figure(record, "steps", f"{preset}, bf16, {how}", "windows_per_second")
            for preset in PRESETS
        ]
        for how in ("off", "auto", "graph", "compile")
    }
    bars = {how: values for how, values in bars.items() if any(values)}
    runs = [row for row in record.get("accuracy", {}).values() if row.get("history")]
    if not bars and not runs:
        return
    canvas = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for number_, (how, values) in enumerate(bars.items()):
        places = [at + number_ * 0.8 / len(bars) for at in range(len(PRESETS))]
        left.bar(places, [v or 0 for v in values], 0.8 / len(bars), label=how, align="edge")
    left.set_xticks([at + 0.4 for at in range(len(PRESETS))], PRESETS)
    left.set(ylabel="windows per second", yscale="log" if bars else "linear")
    for run in runs:
        seconds = [row["seconds"] for row in run["history"]]
        right.plot(seconds, [row["val"] for row in run["history"]], label=run["model"])
    right.set(xlabel="seconds of training", ylabel="validation MAE (mph)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    path = (folder / "gpu-smoke.png") if folder else RESULTS / "gpu.png"
    replace_atomically(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=120))


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def mib(count: float | None) -> str:
    return number(None if count is None else count / MIB, "{:.0f}")
