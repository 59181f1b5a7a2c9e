"""Tables of `published_gpu.py`: errors beside the other tools', verdicts, bounds and margin."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import markdown, source_line

from expt.memory.planning.plan import CUDA_MARGIN

Row = Mapping[str, Any]
TOOLS = ("xMem", "DNNMem", "SchedTune", "LLMem")
OURS = "`plan`"
FAMILIES: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "CNN": lambda row: row["family"] == "cnn",
    "transformers on RTX": lambda row: row["family"] != "cnn" and "RTX" in row["gpu"],
    "large, on A100": lambda row: row["family"] != "cnn" and "RTX" not in row["gpu"],
}
FITTED_ON = ("convnext", "distilgpt2", "mnasnet", "mobilenet", "regnet", "t5")
"""Models, by how their names begin, that the constants of the bounds were set on."""


def tables(record: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the summary in a few sentences, and the tables."""
    rows = [row for row in record["rows"] if "predicted_reserved_bytes" in row]
    ran = [row for row in rows if not row["real_oom"]]
    if not ran:
        return "No run was planned.", ""
    parts = [errors_table(ran), verdicts_table(rows), bounds_table(ran), failures(ran)]
    return summary(record, rows, ran), "\n".join([*parts, source_line(record, name)])


def error(row: Row, tool: str = OURS) -> float | None:
    """Return a tool's error over what was measured; None where it said nothing."""
    if tool == OURS:
        return abs(float(row["predicted_reserved_bytes"] / row["ground"]) - 1)
    found = row.get(tool)
    return None if not found or found["error"] is None else abs(float(found["error"]))


def errors_of(rows: Sequence[Row], tool: str) -> list[float]:
    """Return a tool's errors in ascending order."""
    return sorted(e for e in (error(row, tool) for row in rows) if e is not None)


def figures(errors: Sequence[float]) -> tuple[float, float, float, float]:
    """Return median, mean, 90th percentile and worst."""
    return (
        statistics.median(errors), statistics.mean(errors),
        errors[min(len(errors) - 1, int(0.9 * len(errors)))], errors[-1],
    )  # fmt: skip


def errors_table(ran: Sequence[Row]) -> str:
    """Return errors of the reserved bytes by family and tool."""
    columns = (
        "median / mean / p90 / worst, %",
        *(f"{name} ({_count(ran, name)})" for name in FAMILIES),
    )
    body = []
    for tool in (OURS, *TOOLS):
        cells = []
        for belongs in FAMILIES.values():
            found = errors_of([row for row in ran if belongs(row)], tool)
            words = " / ".join(_percent(value) for value in figures(found)) if found else "-"
            few = len(found) < sum(map(belongs, ran))
            cells.append(f"{words} (of {len(found)})" if found and few else words)
        body.append((tool, *cells))
    return markdown(columns, body)


def _count(rows: Sequence[Row], family: str) -> int:
    return sum(map(FAMILIES[family], rows))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value < 0.1 else f"{100 * value:.0f}"


def verdicts_table(rows: Sequence[Row]) -> str:
    """Return how often it was said rightly whether a run runs out of memory."""
    body = []
    for tool in (OURS, *TOOLS):
        said = [
            (row["runs_out"] if tool == OURS else row[tool]["oom"], row["real_oom"])
            for row in rows
            if tool == OURS or (row.get(tool) and row[tool]["oom"] is not None)
        ]
        right = sum(one == real for one, real in said)
        found = sum(one for one, real in said if real)
        body.append((tool, f"{right} of {len(said)}", f"{found} of {sum(r for _, r in said)}"))
    return markdown(("will it run out?", "right", "of those that did"), body)


def bounds_table(ran: Sequence[Row]) -> str:
    """Return how many measurements lie inside their bounds, by half of the models."""
    halves = {
        "models that the bounds were set on": [row for row in ran if fitted(row)],
        "all other models": [row for row in ran if not fitted(row)],
    }
    body = []
    for name, rows in halves.items():
        if not rows:
            continue
        inside = sum(low <= row["ground"] <= high for row in rows for low, high in [bounds(row)])
        widths = sorted(high / row["predicted_reserved_bytes"] - 1 for row in rows
                        for _, high in [bounds(row)])  # fmt: skip
        body.append((name, str(len({row["model"] for row in rows})), f"{inside} of {len(rows)}",
                     f"+{100 * statistics.median(widths):.0f} %"))  # fmt: skip
    return markdown(("bounds", "models", "measured inside", "upper bound, median"), body)


def fitted(row: Row) -> bool:
    """Tell whether a run's model is of the half that the bounds were set on."""
    return str(row["model"]).rpartition("/")[2].lower().startswith(FITTED_ON)


def bounds(row: Row) -> tuple[float, float]:
    """Return a run's interval."""
    low, high = row["interval_bytes"]
    return float(low), float("inf") if high is None else float(high)


def failures(ran: Sequence[Row]) -> str:
    """Say how many runs are known, or possible, to fail with the margin over the estimate."""
    fates = [fate(row) for row in ran]
    return (
        f"With the margin of {CUDA_MARGIN:.0%} over the estimate as its limit, "
        f"{fates.count(False)} of {len(ran)} runs are known to fail, and of {fates.count(None)} it "
        "is not known (what they had used without a limit is more than that, and no second run "
        "with a limit tells).\n"
    )


def fate(row: Row) -> bool | None:
    """Tell whether a run works with the estimate and its margin as limit; None: not known.

    Known are what the run took without a limit, and second runs with the other tools' estimates
    as limits: those that worked, with what they took, and those that ran out.
    """
    limit = row["least_fitting_bytes"]
    if row["ground"] <= limit:
        return True
    second = [row[tool] for tool in TOOLS if row.get(tool)]
    worked = [one for one in second if one["second_oom"] is False]
    took = [one["memory"] / (1 + (one["second_error"] or 0.0)) for one in worked]
    if any(count <= limit for count in took):
        return True
    ran_out = [one["memory"] for one in second if one["second_oom"]]
    return False if any(count >= limit for count in ran_out) else None


def summary(record: Mapping[str, Any], rows: Sequence[Row], ran: Sequence[Row]) -> str:
    """Return what is found, in a few sentences."""
    ours = figures(errors_of(ran, OURS))
    best = min(
        (tool for tool in TOOLS if len(errors_of(ran, tool)) > len(ran) / 2),
        key=lambda tool: statistics.median(errors_of(ran, tool)),
        default="",
    )
    other = f" (the best other tool, {best}: " if best else ""
    if best:
        theirs = figures(errors_of(ran, best))
        other += f"{_percent(theirs[0])} % and {_percent(theirs[2])} %)"
    right = sum(row["runs_out"] == row["real_oom"] for row in rows)
    inside = sum(low <= row["ground"] <= high for row in ran for low, high in [bounds(row)])
    seconds = statistics.median(row["seconds"] for row in rows)
    return (
        f"Against {len(record['rows'])} published runs on cards, reserved bytes: median error "
        f"{_percent(ours[0])} %, nine in ten within {_percent(ours[2])} %{other}; "
        f"{len(rows)} planned, {right} of {len(rows)} verdicts on running out right, {inside} of "
        f"{len(ran)} measurements inside the bounds; {seconds:.1f} s a plan.\n"
    )
