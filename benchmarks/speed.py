"""How fast: answering, the first step, the loop against others, bookkeeping, steps, what pays.

    python benchmarks/speed.py [--sections NAME ...] [--again] [--smoke]

Every section is measured in a process of its own and stored when it is done; one that is in the
result file is skipped unless `--again`. Ratios are within one run: contenders alternate in
rounds, and a figure is the median over rounds. For figures worth quoting, nothing else may run;
the load of the machine at the start is stored with each section.

`--smoke` runs all of it briefly, to see that it works, and stores nothing but
outputs/benchmarks/speed-smoke.json. Lightning is installed for the comparison into a folder of
its own under outputs/ (never by `--smoke`); without it, its column says so. The environment
variable EXPT_PEMS_BAY may name a series of 67 sensors; else 67 of `metr_la_week` are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, load, markdown, provenance, source_line, store

from expt.files import write_json

PRESETS = ("minimal", "lite")
MIDDLE_SERIES = "EXPT_PEMS_BAY"


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    repeats: int
    rounds: int
    steps: int
    run_steps: int
    sensors: tuple[int, ...]
    batches: tuple[int, ...]


THOROUGH = Effort(5, 7, 40, 400, (29, 67, 207), (4, 8, 16, 32))
SMOKE = Effort(1, 2, 3, 8, (29, 67, 207), (4, 8))


def measure_help(effort: Effort, arguments: argparse.Namespace) -> Any:
    from launch_times import help_times

    return help_times(effort.repeats)


def measure_first_step(effort: Effort, arguments: argparse.Namespace) -> Any:
    from launch_times import first_step_times

    return first_step_times(min(effort.repeats, 3), arguments.device, "+memory=lite")


def measure_loops(effort: Effort, arguments: argparse.Namespace) -> Any:
    from loop_times import measure
    from rival_loops import installed_lightning

    lightning = None if arguments.smoke else installed_lightning()
    return {
        preset: measure(preset, arguments.device, effort.rounds, effort.steps, lightning)
        for preset in PRESETS
    }


def measure_bookkeeping(effort: Effort, arguments: argparse.Namespace) -> Any:
    from bookkeeping import measure

    return {preset: measure(preset, arguments.device, effort.run_steps) for preset in PRESETS}


def measure_step_costs(effort: Effort, arguments: argparse.Namespace) -> Any:
    from step_costs import measure

    return measure(
        PRESETS, effort.sensors, effort.batches, arguments.device,
        max(1, effort.rounds - 2), 1 if arguments.smoke else 3, middle_series(),
    )  # fmt: skip


def measure_cpu(effort: Effort, arguments: argparse.Namespace) -> Any:
    """Time what a CPU may gain: bf16, torch.compile, threads."""
    from cpu_contenders import measure

    if arguments.smoke:
        return measure(PRESETS[:1], (29,), 0.05, "model.embed_dim=8", "data.batch_size=2")
    return measure(PRESETS, (29, 207), 4.0)


def middle_series() -> Path | None:
    """Return the user's file of 67 sensors; named by the environment, to stay out of the record."""
    path = os.environ.get(MIDDLE_SERIES)
    return Path(path) if path else None


SECTIONS: dict[str, Callable[[Effort, argparse.Namespace], Any]] = {
    "help": measure_help,
    "first_step": measure_first_step,
    "loops": measure_loops,
    "bookkeeping": measure_bookkeeping,
    "step_costs": measure_step_costs,
    "cpu": measure_cpu,
}


def main() -> None:
    arguments = parse()
    if arguments.section:
        effort = SMOKE if arguments.smoke else THOROUGH
        print(json.dumps(SECTIONS[arguments.section](effort, arguments)))
        return
    record: dict[str, Any] = {} if arguments.smoke else load("speed")
    for name in arguments.sections:
        if name in record and not arguments.again:
            continue
        print(name, flush=True)
        load_average = os.getloadavg()[0]
        command = [sys.executable, __file__, *sys.argv[1:], "--section", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record["made"] = provenance()
        record[name] = {
            "result": json.loads(done.stdout.splitlines()[-1]),
            "load_average_at_start": load_average,
            "made": record["made"],
        }
        if arguments.smoke:
            write_json(ROOT / "outputs" / "benchmarks" / "speed-smoke.json", record)
        else:
            store("speed", record, tables(record))
            if name == "step_costs":
                plot(record, RESULTS / "speed.png")
    if arguments.smoke:
        plot(record, ROOT / "outputs" / "benchmarks" / "speed-smoke.png")
        print(tables(record))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--again", action="store_true", help="measure what is stored already")
    parser.add_argument("--smoke", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def plot(record: dict[str, Any], path: Path) -> None:
    from step_costs import plot as draw

    if "step_costs" in record:
        draw(record["step_costs"]["result"], path)


def tables(record: dict[str, Any]) -> str:
    """Return the page's tables."""
    results = {name: record[name]["result"] for name in SECTIONS if name in record}
    parts = []
    if launch := [*launch_rows(results)]:
        parts.append(markdown(("from launch to", "seconds", "compared with"), launch))
    if loops := results.get("loops"):
        columns = ("loop, ms a step", "ours", "bare loop", "lightning", "ours / bare")
        parts.append(markdown(columns, [loop_row(loops[name]) for name in PRESETS]))
    if books := results.get("bookkeeping"):
        columns = ("part of an epoch", *next(iter(books.values()))["shares_of_an_epoch"], "all")
        parts.append(markdown(columns, [book_row(books[name]) for name in PRESETS]))
    if costs := results.get("step_costs"):
        parts.append(cost_table(costs))
    if cpu := results.get("cpu"):
        from cpu_contenders import CONTENDERS, table_rows

        parts.append(markdown(("ms a step, on the CPU", *CONTENDERS), table_rows(cpu)))
    return "\n".join(parts) + "\n" + source_line(record, "speed")


def launch_rows(results: dict[str, Any]) -> Any:
    if found := results.get("help"):
        bare = found["bare Hydra"]["seconds"]
        yield "`--help`", f"{found['expt']['seconds']:.2f}", f"bare Hydra {bare:.2f}"
    if found := results.get("first_step"):
        none, new = found["tracking=none"]["seconds"], found["no database yet"]["seconds"]
        yield (
            "first optimizer step, database present",
            f"{found['database present']['seconds']:.1f}",
            f"`tracking=none` {none:.1f}, no database yet {new:.1f}",
        )


def loop_row(row: dict[str, Any]) -> tuple[str, ...]:
    def cell(name: str) -> str:
        if name not in row:
            return "failed" if name in row.get("failed", {}) else "not installed"
        return f"{1e3 * row[name]['seconds_per_step']:.1f}"

    ratio = f"{row['bare loop']['ours_over_it']:.2f}"
    return (row["preset"], cell("ours"), cell("bare loop"), cell("lightning"), ratio)


def book_row(row: dict[str, Any]) -> tuple[str, ...]:
    parts = [*row["shares_of_an_epoch"].values(), row["share"]]
    return (row["preset"], *(f"{100 * part:.2f} %" for part in parts))


def cost_table(costs: dict[str, Any]) -> str:
    rows = costs["rows"]
    batches = sorted({row["batch_size"] for row in rows})
    keys = dict.fromkeys((row["preset"], row["sensors"]) for row in rows)
    cells = {(row["preset"], row["sensors"], row["batch_size"]): row for row in rows}
    lines = [
        (
            f"{preset}, {sensors}",
            *(
                f"{1e3 * cells[preset, sensors, batch]['seconds_per_step']:.0f}"
                for batch in batches
            ),
        )
        for preset, sensors in keys
    ]
    columns = ("ms a step by preset, sensors", *(f"batch {batch}" for batch in batches))
    return markdown(columns, lines)


if __name__ == "__main__":
    main()
