"""How small: the measured peak of a training step at 207 sensors, batch as in the presets.

    python benchmarks/memory.py [--device cpu|cuda] [--again]

On the CPU the peak is that of a ledger of tensor storages, checked here against the allocation
events of `torch.profiler`; on CUDA that of the allocator. Rows already in the result file are
kept unless `--again`; each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from common import (
    load,
    make_trainer,
    markdown,
    provenance,
    settings_for,
    source_line,
    stamped,
    store,
)

PRESETS = ("full", "lite", "minimal")
CLAIMED_GB = {"full": 30, "lite": 6, "minimal": 3}  # the guide's own estimates
WARM_STEPS, TIMED_STEPS = 1, 2
GIB = 1024**3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--row", nargs=3, metavar=("PRESET", "PRECISION", "CHECKPOINTING"))
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(*arguments.row, arguments.device)))
        return
    record = {"rows": {}, "guide": {}, **load("memory")}
    for preset in reversed(PRESETS):  # the quickest first
        for precision, checkpointing in (("fp32", "false"), ("bf16", "false"), ("bf16", "true")):
            name = f"{preset}-{precision}-{checkpointing}-{arguments.device}"
            if name in record["rows"] and not arguments.again:
                continue
            print(name, flush=True)
            command = [sys.executable, __file__, "--device", arguments.device, "--row"]
            done = subprocess.run(
                [*command, preset, precision, checkpointing],
                capture_output=True,
                text=True,
                check=True,
            )
            record["rows"][name] = stamped(json.loads(done.stdout.splitlines()[-1]))
            record["guide"].setdefault(preset, guide_peak(preset))
            record["made"] = provenance()
            store("memory", record, tables(record))


def measure(preset: str, precision: str, checkpointing: str, device: str) -> dict[str, Any]:
    """Return peak bytes and seconds per step of one configuration."""
    trainer = make_trainer(
        f"+memory={preset}",
        "data=metr_la_week",
        f"memory.precision={precision}",
        f"memory.activation_checkpointing={checkpointing}",
        f"trainer.device={device}",
    )
    trainer.model.train()
    batch = trainer.batches.of(torch.arange(trainer.data.batch_size))
    trainer.meter.start_epoch()
    for _ in range(2):
        with trainer.meter.step():
            trainer.train_step(batch)
    peak = trainer.meter.peak_allocated_bytes()
    row = {
        "preset": preset,
        "precision": precision,
        "checkpointing": checkpointing == "true",
        "device": device,
        "batch_size": trainer.data.batch_size,
        "peak_bytes": peak,
        "meter": trainer.meter.name,
        "seconds_per_step": seconds_per_step(trainer, batch),
    }
    if device == "cpu" and precision == "fp32":
        row["profiler_peak_bytes"] = profiler_peak_bytes(trainer, batch)
    return row


def seconds_per_step(trainer: Any, batch: Any) -> float:
    for _ in range(WARM_STEPS):
        trainer.train_step(batch)
    if trainer.fabric.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.train_step(batch)
    if trainer.fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / TIMED_STEPS


def profiler_peak_bytes(trainer: Any, batch: Any) -> int:
    """Return the peak of a step from the profiler's allocation events, plus what lived before."""
    from torch.profiler import ProfilerActivity, profile

    before = live_bytes(trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step(batch)
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    live = peak = before
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def live_bytes(trainer: Any) -> int:
    """Return the bytes of every tensor that outlives a step: weights, optimizer state, data."""
    state = [value for slots in trainer.optimizer.state.values() for value in slots.values()]
    data = [value for value in vars(trainer.data).values() if isinstance(value, torch.Tensor)]
    for value in vars(trainer.data).values():
        if isinstance(value, dict):
            data += [part for part in value.values() if isinstance(part, torch.Tensor)]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *state, *data]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def guide_peak(preset: str) -> int:
    """Return the traced fp32 peak of the guide's own model, in a sketch."""
    from guide_model import GUIDE_DROPOUT, GUIDE_FFN_RATIO, traced_peak_bytes

    arguments = settings_for(f"+memory={preset}", "data=metr_la_week").arguments
    sizes, batch_size = arguments["model"], arguments["data"]["batch_size"]
    changed = {"ffn_ratio": GUIDE_FFN_RATIO, "dropout": GUIDE_DROPOUT}
    kept = {key: value for key, value in sizes.items() if key != "_target_"}
    return traced_peak_bytes({**kept, **changed}, batch_size, num_sensors=207)


def tables(record: dict[str, Any]) -> str:
    """Return the page's tables."""
    devices = {row["device"] for row in record["rows"].values()}
    parts = []
    for device in sorted(devices):
        columns = (
            "preset", "guide, claimed", "guide's model, traced fp32", "fp32", "bf16",
            "bf16 + checkpointing", "slowdown",
        )  # fmt: skip
        rows = [cells(record, preset, device) for preset in PRESETS]
        parts.append(f"Peak of a training step at 207 sensors, on {device}:\n")
        parts.append(markdown(columns, [row for row in rows if row]))
    gaps = [
        abs(row["peak_bytes"] / row["profiler_peak_bytes"] - 1)
        for row in record["rows"].values()
        if "profiler_peak_bytes" in row
    ]
    if gaps:
        parts.append(
            f"The ledger and the profiler's allocation events differ by at most "
            f"{100 * max(gaps):.2f} % in fp32. "
        )
    return "\n".join(parts) + source_line(record, "memory")


def cells(record: dict[str, Any], preset: str, device: str) -> tuple[str, ...]:
    rows = record["rows"]

    def row(precision: str, checkpointing: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = rows.get(f"{preset}-{precision}-{checkpointing}-{device}")
        return found

    plain, saving = row("bf16", "false"), row("bf16", "true")
    slowdown = "not measured"
    if plain and saving:
        slowdown = f"x{saving['seconds_per_step'] / plain['seconds_per_step']:.2f}"
    guide = record["guide"].get(preset)
    return (
        preset,
        f"{CLAIMED_GB[preset]} GB",
        "not measured" if guide is None else f"{guide / GIB:.1f} GiB",
        *(peak(found) for found in (row("fp32", "false"), plain, saving)),
        slowdown,
    )


def peak(row: dict[str, Any] | None) -> str:
    return "not measured" if row is None else f"{row['peak_bytes'] / GIB:.3f} GiB"


if __name__ == "__main__":
    main()
