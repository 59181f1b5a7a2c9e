"""Everything that is claimed about a GPU, measured with one command, in as many sittings as wanted.

    python benchmarks/gpu.py --minutes 20 [--sections NAME ...] [--only TEXT] [--again]
    python benchmarks/gpu.py --device cpu --smoke      # every section, tiny: does it all work?

Stops by itself when the minutes are up, or less than a minute later if it is training, and the
same command goes on: rows that are stored are kept, trainings resume from their checkpoints, and
an item that was under way begins anew. Rows of another card, torch or code are kept apart
(`gpu_record.py`). Where `expt` is not installed, set PYTHONPATH=src. Needs torch >= 2.11,
hydra-core, omegaconf, pydantic and lightning-fabric (which comes with pytorch-lightning), and no
network; MLflow and Optuna are not used, lightning's Trainer is measured where
`pytorch_lightning` is installed. EXPT_METR_LA may name a file of the whole METR-LA series.

An item is measured in a process of its own where memory is its figure; others share a process,
which is started again after an item that fails or ends it. `measured_in` says which. What needs
torch.compile comes after all the rest but the trainings, since compiling takes long.
`--smoke` writes outputs/benchmarks/gpu-smoke.json and .md and no result.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from common import ROOT, load, store
from gpu_record import Group, last_group, looked_up
from gpu_sections import MARGIN_SECONDS, NEEDED, OWN_PROCESS, SECTIONS, Plan, importable, version
from gpu_tables import DRAWN, all_details, draw, tables
from watched import Watched

from expt.files import write_json, write_text

SCRATCH = ROOT / "outputs" / "benchmarks"
OLDEST_TORCH = (2, 11)
ANSWER = '{"item"'
"""How a line of a section's process begins that holds a row."""
ITEM_SECONDS = 600.0
"""The most that an item may take, but for trainings."""
TOO_LONG = "it took more than"


def main() -> None:
    arguments = parse()
    until = arguments.until or time.time() + 60 * arguments.minutes
    plan = Plan(arguments.device, arguments.smoke, until, arguments.again, arguments.group)
    if arguments.section:
        for item, row in rows(plan, arguments.section, arguments.items):
            print(json.dumps({"item": item, "row": row}), flush=True)
        return
    record: dict[str, Any] = {} if plan.smoke else load("gpu")
    if arguments.tables:
        store("gpu", record, tables(last_group(record)), all_details(record))
        return
    check(plan)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    group = Group(record, looked_up(plan.device))
    plan = Plan(plan.device, plan.smoke, until, arguments.again, group.folder)
    for name, wanted in in_order(plan, arguments.sections, arguments.only, group):
        measure(plan, name, wanted, group)
    if plan.seconds_left < 0:
        print("the minutes are up; the same command goes on")


def in_order(
    plan: Plan, sections: list[str], only: str, group: Group
) -> list[tuple[str, list[str]]]:
    """Return sections with the items to measure, those last that may take all of the minutes."""

    def rank(place: tuple[str, str]) -> int:
        section, item = place
        late = TOO_LONG in str(group.sections.get(section, {}).get(item, {}).get("error"))
        return 3 if section == "accuracy" else 2 if late else 1 if "compile" in item else 0

    wanted = [
        (name, item)
        for name in sections
        for item in SECTIONS[name](plan)
        if only in item and (plan.again or not done(group.sections.get(name, {}).get(item)))
    ]
    ordered = groupby(sorted(wanted, key=rank), key=lambda place: place[0])
    return [(name, [item for _, item in places]) for name, places in ordered]


def measure(plan: Plan, section: str, wanted: list[str], group: Group) -> None:
    """Measure a section's items, and store each as it comes."""
    source = rows if plan.smoke else answers  # a smoke run saves itself the processes
    together = not plan.smoke and section in OWN_PROCESS
    while wanted and plan.seconds_left > 0:
        for item, row in source(plan, section, wanted[:1] if together else wanted):
            wanted.remove(item)
            group.put(section, item, row)
            print(f"{section}: {item}: {brief(row)}", flush=True)
            keep(plan, group)
        if plan.smoke:
            break
    if section in DRAWN and version("matplotlib") is not None:  # welcome, not needed
        draw(group.sections, SCRATCH if plan.smoke else None)


def answers(plan: Plan, section: str, wanted: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield items and rows from a process of its own; the one that ended it is an error."""
    command = [sys.executable, __file__, "--device", plan.device, "--section", section]
    command += ["--until", str(plan.until), "--group", plan.group]
    command += ["--again"] if plan.again else []
    left, failed = list(wanted), False
    with Watched([*command, "--items", *left]) as worker:
        worker.allow(allowed(plan, section))
        for line in worker.lines():
            if line.startswith(ANSWER):
                answer = json.loads(line)
                left.remove(answer["item"])
                failed = "error" in answer["row"]
                yield answer["item"], answer["row"]
                worker.allow(allowed(plan, section))
                if failed:  # the rest is for another process, however this one ends
                    return
        status = worker.returncode
    if not left:
        if status != 0:  # all was measured; the rest of the sections can be as well
            print(f"{section}: the process ended with {status} after its last item")
    elif not worker.timed_out:
        if status != 0:
            yield left[0], {"error": f"the process ended with {status}"}
        elif len(left) == len(wanted) and plan.seconds_left > 0:  # else it stopped on purpose
            yield left[0], {"error": "the process ended well, but with no row"}
    elif plan.seconds_left > 0:
        yield left[0], {"error": f"{TOO_LONG} {ITEM_SECONDS:.0f} s"}
    else:
        print(f"{section}: {left[0]}: the minutes were up before it was measured", flush=True)


def allowed(plan: Plan, section: str) -> float:
    """Return the seconds that an item may take from now on."""
    if section == "accuracy":  # it stops by itself, and saves
        return plan.seconds_left + MARGIN_SECONDS
    return min(plan.seconds_left, ITEM_SECONDS)


def rows(plan: Plan, section: str, wanted: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure items one after the other, until the minutes are up or one goes wrong.

    After an error of CUDA nothing works in this process any more, and what comes next would be
    blamed for it; `measure` goes on with the rest in another one.
    """
    from expt.errors import UserError

    items = SECTIONS[section](plan)
    for number, name in enumerate(list(wanted)):
        if plan.seconds_left < 0:
            return
        try:
            row = dict(items[name]())
        except (
            UserError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError,
            OSError, ImportError,
        ) as error:  # fmt: skip
            if plan.smoke:
                raise
            row = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        after = f"the process of {number} items before it" if number else "a process of its own"
        yield name, {**row, "measured_in": after}
        if "error" in row:
            return
        tidy(plan.device)


def keep(plan: Plan, group: Group) -> None:
    shown = tables(group.sections)
    if plan.smoke:
        write_json(SCRATCH / "gpu-smoke.json", group.record)
        write_text(SCRATCH / "gpu-smoke.md", shown + all_details(group.record))
    else:
        store("gpu", group.record, shown, all_details(group.record))


def check(plan: Plan) -> None:
    """End with what is missing, if something is."""
    absent = [name for name, module in NEEDED.items() if not importable(module)]
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
    parser.add_argument(
        "--again", action="store_true", help="anew, what is stored too; once, not to go on"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny; stores no result")
    for name in ("--section", "--until", "--items", "--group"):
        kind: dict[str, Any] = {
            "--until": {"type": float}, "--items": {"nargs": "*"}, "--group": {"default": ""},
        }  # fmt: skip
        parser.add_argument(name, help=argparse.SUPPRESS, **kind.get(name, {}))
    return parser.parse_args()


if __name__ == "__main__":
    main()
