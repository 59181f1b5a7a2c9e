"""The files of `debug=profile`: a trace, tables of operators and of memory, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from expt.files import write_json, write_text
from expt.memory.measuring.timeline import CATEGORIES, Timeline
from expt.memory.measuring.timeline_sums import MemorySums, OperatorMemory, PhaseMemory, sums_of
from expt.tables import markdown_table
from expt.units import counted, format_bytes

TRACE, TABLE = "profile.json", "profile.txt"
MEMORY, MEMORY_TABLE = "profile_memory.json", "profile_memory.md"
PICTURE = Path("plots/memory_timeline.png")
SHOWN_OPERATORS = 20


def write_profile(
    finished: Any,
    timeline: Timeline | None,
    run_dir: Path,
    measured_bytes: int | None,
    predicted_bytes: int | None,
    say: Callable[[str], None],
) -> list[Path]:
    """Write what a profiler saw; return the files.

    Args:
        finished: torch's profiler.
        timeline: of memory; None where there is none to read.
        run_dir: where the files belong.
        measured_bytes: the run's peak so far, as its meter has it.
        predicted_bytes: the peak that was predicted.
        say: told what was found.

    """
    finished.export_chrome_trace(str(run_dir / TRACE))
    table = finished.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=30)
    write_text(run_dir / TABLE, table)
    written = [run_dir / TRACE, run_dir / TABLE]
    if timeline is None:
        say(f"profiled; {TRACE}, {TABLE}. Memory is not profiled on this device")
        return written
    sums = sums_of(timeline)
    peaks = {"measured_peak_bytes": measured_bytes, "predicted_peak_bytes": predicted_bytes}
    write_json(run_dir / MEMORY, {"torch": torch.__version__, **peaks, **sums.as_dict()})
    write_text(run_dir / MEMORY_TABLE, memory_tables(sums, measured_bytes, predicted_bytes))
    from expt.training.timeline_figure import draw_timeline

    draw_timeline(timeline, sums, predicted_bytes, run_dir / PICTURE)
    say(
        f"profiled {counted(len(sums.steps), 'step')}: at most {format_bytes(sums.peak_bytes)}, in "
        f"{sums.peak_phase} ({sums.peak_operator}); {MEMORY_TABLE}, {PICTURE}, {TRACE}"
    )
    return [*written, run_dir / MEMORY, run_dir / MEMORY_TABLE, run_dir / PICTURE]


def memory_tables(sums: MemorySums, measured_bytes: int | None, predicted_bytes: int | None) -> str:
    """Return the peak, and tables of phases and operators, in Markdown."""
    head = (
        f"{counted(len(sums.steps), 'step')}; at most {format_bytes(sums.peak_bytes)} were "
        f"allocated, in {sums.peak_phase} ({sums.peak_operator}). The run's meter had measured "
        f"{format_bytes(measured_bytes)} by then"
    )
    if predicted_bytes is not None:
        head += f"; predicted of a step were {format_bytes(predicted_bytes)}"
    return "\n".join(
        [
            f"{head}.\n",
            "By phase, each where it came highest, and what was there at that moment:\n",
            phase_table(sums.phases),
            "By operator, over all steps, the one that held most first:\n",
            operator_table(sums.operators[:SHOWN_OPERATORS]),
        ]
    )


def phase_table(phases: Sequence[PhaseMemory]) -> str:
    """Return a row per phase; categories that are nowhere are left out."""
    shown = [name for name in CATEGORIES if any(row.by_category[name] for row in phases)]
    rows = [["phase", "times", "start", "peak", "end", *(name.replace("_", " ") for name in shown)]]
    for row in phases:
        counts = [row.start_bytes, row.peak_bytes, row.end_bytes]
        counts += [row.by_category[name] for name in shown]
        rows.append([row.phase.replace("_", " "), str(row.times), *map(format_bytes, counts)])
    return markdown_table(rows, range(1, len(rows[0])))


def operator_table(operators: Sequence[OperatorMemory]) -> str:
    """Return a row per operator."""
    rows = [["operator", "calls", "asked for", "net", "most held at once", "held at the peak"]]
    for row in operators:
        counts = [row.allocated_bytes, row.net_bytes, row.most_held_bytes, row.at_peak_bytes]
        rows.append([row.operator, str(row.calls), *map(format_bytes, counts)])
    return markdown_table(rows, range(1, len(rows[0])))
