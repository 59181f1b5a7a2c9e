"""How right on a GPU: predicted against CUDA's own peak, allocated and reserved.

    python benchmarks/gpu_memory.py [--minutes 25] [--again] [--only TEXT]

The configurations of `benchmarks/prediction.py`, planned for CUDA before the card is touched and
then measured by `torch.cuda.max_memory_allocated` and `max_memory_reserved`; and the guide's
presets at 207 sensors, claimed, predicted, measured. Resumable: rows already in the result file
are kept, and it stops by itself when the minutes are up. Needs a CUDA device, no network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import planned_steps
import torch
from common import load, markdown, source_line, store
from foreign_models import MODELS
from gpu_record import Group, looked_up
from prediction import OPTIMIZERS, rows

CLAIMED_GB = {"full": 30, "lite": 6, "minimal": 3}  # the guide's own estimates
GIB, MIB = 1024**3, 1024**2


def all_rows() -> dict[str, dict[str, Any]]:
    """Return the configurations of the CPU benchmark for CUDA, after the guide's presets."""
    found: dict[str, dict[str, Any]] = {}
    for preset, precision in itertools.product(CLAIMED_GB, ("fp32", "bf16")):
        found[f"guide {preset} {precision}"] = {
            "overrides": [f"+memory={preset}", "data=metr_la_week", f"memory.precision={precision}"]
        }
    for name, row in rows().items():
        if "overrides" in row:
            row["overrides"] = [o for o in row["overrides"] if not o.startswith("trainer.device")]
        found[name] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--row")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(**all_rows()[arguments.row])))
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_memory.py measures a CUDA device, and there is none here")
    ends = time.monotonic() + 60 * arguments.minutes
    record = load("gpu_memory")
    group = Group(record, looked_up("cuda"))
    rows_so_far = group.sections.setdefault("rows", {})
    for name in all_rows():
        if arguments.only not in name or (name in rows_so_far and not arguments.again):
            continue
        left = ends - time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--row", name],
                capture_output=True, text=True, check=False, timeout=max(left, 0.1),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print("the minutes are up; run it again to go on")
            return
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{name}: not measured: {reason}", flush=True)
            continue
        group.put("rows", name, json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {100 * error(group.sections['rows'][name]):+.2f} %", flush=True)
        store("gpu_memory", record, tables(group.sections))


def measure(
    overrides: list[str] | None = None,
    foreign: str = "",
    precision: str = "fp32",
    batch: int = 0,
    optimizer: str = "",
) -> dict[str, Any]:
    """Return predicted and measured peaks of one configuration."""
    if overrides is not None:
        return measure_ours(overrides)
    made = planned_steps.foreign(MODELS[foreign], precision, batch, OPTIMIZERS[optimizer], "cuda")
    return as_row(made)


def measure_ours(overrides: list[str], device: str = "cuda") -> dict[str, Any]:
    """Return both peaks of one of our configurations; on the CPU to see that this works.

    Its steps are eager: captured ones are measured by benchmarks/gpu.py.
    """
    return as_row(planned_steps.ours(overrides, device))


def as_row(made: planned_steps.PlannedStep) -> dict[str, Any]:
    """Measure a warm step; what is reserved is that of the whole process."""
    predicted = made.predicted

    def step() -> None:
        for part in made.parts:
            part()

    for _ in range(2):
        step()
    allocated, reserved = peaks(step, predicted.target)
    return {
        "predicted_bytes": predicted.peak_bytes,
        "predicted_reserved_bytes": predicted.reserved_bytes,
        "interval_bytes": list(predicted.interval_bytes),
        "measured_bytes": allocated,
        "measured_reserved_bytes": reserved,
        "corrections": dict(predicted.corrections),
        "seconds": predicted.seconds,
    }


def peaks(step: Callable[[], None], device: str) -> tuple[int, int | None]:
    """Return the peaks of allocated and reserved bytes in a step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    from expt.memory.measuring.ledger import StorageLedger

    with StorageLedger() as ledger:
        step()
    return ledger.peak_bytes, None


def error(row: dict[str, Any]) -> float:
    """Predicted over measured, less one."""
    return float(row["predicted_bytes"] / row["measured_bytes"] - 1)


def tables(record: dict[str, Any]) -> str:
    """Return the summary, the guide's presets, and all rows."""
    found = record["rows"]
    gaps = sorted(abs(error(row)) for row in found.values())
    summary = (
        f"Predicted against measured peak on a GPU over {len(gaps)} configurations: median error "
        f"{100 * statistics.median(gaps):.1f} %, worst {100 * gaps[-1]:.1f} %. "
    )
    guide = [
        (preset, f"{claim} GB", *figures(found.get(f"guide {preset} bf16")))
        for preset, claim in CLAIMED_GB.items()
    ]
    body = [(name, *figures(row), f"{100 * error(row):+.1f} %") for name, row in found.items()]
    names = ("predicted", "measured", "reserved, predicted", "reserved, measured")
    return "\n".join(
        [
            summary + source_line(record, "gpu_memory"),
            markdown(("preset, bf16", "guide, claimed", *names), guide),
            markdown(("configuration", *names, "error"), body),
        ]
    )


def figures(row: dict[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return ("not measured",) * 4
    keys = (
        "predicted_bytes", "measured_bytes", "predicted_reserved_bytes", "measured_reserved_bytes",
    )  # fmt: skip
    return tuple("-" if row[key] is None else f"{row[key] / MIB:.0f} MiB" for key in keys)


if __name__ == "__main__":
    main()
