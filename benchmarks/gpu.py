"""Everything that is claimed about a GPU, measured with one command, in as many sittings as wanted.

    python benchmarks/gpu.py --minutes 20 [--sections NAME ...] [--only TEXT] [--again]
    python benchmarks/gpu.py --device cpu --smoke      # every section, tiny: does it all work?

Stops by itself when the minutes are up; the same command goes on: rows in the result file are
kept, and trainings resume from their checkpoints. Needs torch >= 2.11, hydra-core, omegaconf and
lightning-fabric, and no network; MLflow and Optuna are not used, lightning's Trainer is measured
where `pytorch_lightning` is installed. EXPT_METR_LA may name a file of the whole METR-LA series.

A section is measured in a process of its own, which is started again after an item that ends it.
`--smoke` writes outputs/benchmarks/gpu-smoke.json and .md and no result.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from common import ROOT, load, provenance, stamped, store
from gpu_sections import NEEDED, SECTIONS, Plan, version
from gpu_tables import details, draw, tables

from expt.files import write_json, write_text

SCRATCH = ROOT / "outputs" / "benchmarks"
OLDEST_TORCH = (2, 11)
ANSWER = '{"item"'
"""How a line of a section's process begins that holds a row."""


def main() -> None:
    arguments = parse()
    until = arguments.until or time.time() + 60 * arguments.minutes
    plan = Plan(arguments.device, arguments.smoke, until)
    if arguments.section:
        for item, row in rows(plan, arguments.section, arguments.items):
            print(json.dumps({"item": item, "row": row}), flush=True)
        return
    record: dict[str, Any] = {} if plan.smoke else load("gpu")
    if arguments.tables:
        store("gpu", record, tables(record), details(record))
        return
    check(plan)
    for name in arguments.sections:
        found = record.setdefault(name, {})
        wanted = [
            item
            for item in SECTIONS[name](plan)
            if arguments.only in item and (arguments.again or not done(found.get(item)))
        ]
        measure(plan, name, wanted, record)
    if plan.seconds_left < 0:
        print("the minutes are up; the same command goes on")


def measure(plan: Plan, section: str, wanted: list[str], record: dict[str, Any]) -> None:
    """Measure a section's items, and store each as it comes."""
    source = rows if plan.smoke else answers  # a smoke run saves itself the processes
    while wanted and plan.seconds_left > 0:
        for item, row in source(plan, section, wanted):
            wanted.remove(item)
            record[section][item] = stamped(row)
            print(f"{section}: {item}: {brief(row)}", flush=True)
            keep(plan, record)
        if version("matplotlib") is not None:  # welcome, not needed
            draw(record, SCRATCH if plan.smoke else None)
        if plan.smoke:
            return


def answers(plan: Plan, section: str, wanted: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield items and rows from a process of its own; the one that ended it is an error."""
    command = [sys.executable, __file__, "--device", plan.device, "--section", section]
    command += ["--until", str(plan.until)]
    left = list(wanted)
    with subprocess.Popen(
        [*command, "--items", *left], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ANSWER):
                answer = json.loads(line)
                left.remove(answer["item"])
                yield answer["item"], answer["row"]
    if process.returncode != 0:
        if not left:
            sys.exit(f"{section}: the process ended with {process.returncode}")
        yield left[0], {"error": f"the process ended with {process.returncode}"}


def rows(plan: Plan, section: str, wanted: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure items one after the other, until the minutes are up."""
    from expt.errors import UserError

    items = SECTIONS[section](plan)
    for name in list(wanted):
        if plan.seconds_left < 0:
            return
        try:
            row = dict(items[name]())
        except (
            UserError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError,
        ) as error:  # fmt: skip
            if plan.smoke:
                raise
            row = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        yield name, row
        tidy(plan.device)


def keep(plan: Plan, record: dict[str, Any]) -> None:
    record["made"] = provenance()
    if plan.smoke:
        write_json(SCRATCH / "gpu-smoke.json", record)
        write_text(SCRATCH / "gpu-smoke.md", tables(record) + details(record))
    else:
        store("gpu", record, tables(record), details(record))


def check(plan: Plan) -> None:
    """End with what is missing, if something is."""
    absent = [name for name in NEEDED if version(name) is None]
    if absent:
        sys.exit(f"benchmarks/gpu.py needs {', '.join(absent)}: bring the wheels along")
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        sys.exit(f"benchmarks/gpu.py needs torch 2.11 or newer, and this is {torch.__version__}")
    if plan.device == "cpu" and not plan.smoke:
        sys.exit("the results are a GPU's; --device cpu goes with --smoke, which stores none")
    if plan.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu --smoke shows that all of it works")


def done(row: Mapping[str, Any] | None) -> bool:
    """Tell whether a stored row needs no more; trainings may be on their way."""
    return row is not None and "error" not in row and bool(row.get("done", True))


def tidy(device: str) -> None:
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def brief(row: Mapping[str, Any]) -> str:
    """Return a row's first few plain figures."""
    plain = {k: v for k, v in row.items() if isinstance(v, int | float | str | bool)}
    shown = list(plain.items())[:8]
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--only", default="", help="items whose name holds this")
    parser.add_argument("--tables", action="store_true", help="write the tables of what is stored")
    parser.add_argument("--again", action="store_true", help="measure what is stored already")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny; stores no result")
    for name in ("--section", "--until", "--items"):
        kind: dict[str, Any] = {"--until": {"type": float}, "--items": {"nargs": "*"}}
        parser.add_argument(name, help=argparse.SUPPRESS, **kind.get(name, {}))
    return parser.parse_args()


if __name__ == "__main__":
    main()
