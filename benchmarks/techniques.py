"""What each memory technique saves and costs: peak and time of a training step at 207 sensors.

    python benchmarks/techniques.py [--device cpu|cuda] [--presets lite full] [--again]

Every row is measured in a process of its own, against the plain row of its preset; rows already
in the result file are kept unless `--again`. All rows train without clipping, whose temporaries
would blur them. `full` is measured in bf16 and at a batch of 4, so that its plain row fits beside
other work; what fits on a CUDA device only is left out on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
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
    store,
)

from expt.errors import UserError

COMMON = ("data=metr_la_week", "trainer.gradient_clip_norm=null")
PRESETS = {
    "lite": ("+memory=lite", "memory.precision=fp32"),
    "full": ("+memory=full", "memory.precision=bf16", "data.batch_size=4"),
}
PLAIN = "plain"
ROWS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "gradient accumulation, 2": ("memory.gradient_accumulation=2",),
    "gradient accumulation, 4": ("memory.gradient_accumulation=4",),
    "activation checkpointing": ("memory.activation_checkpointing=true",),
    "activation checkpointing, every 2nd": ("memory.activation_checkpointing=2",),
    "activation checkpointing, selective": ("memory.activation_checkpointing=selective",),
    "accumulation 4 + checkpointing": (
        "memory.gradient_accumulation=4",
        "memory.activation_checkpointing=true",
    ),
    "attention kernel math": ("memory.attention_kernel=math",),
    "attention kernel sliding_window, 32": (
        "memory.attention_kernel=sliding_window",
        "memory.attention_window=32",
    ),
    "attention kernel top_k, 16": ("memory.attention_kernel=top_k", "memory.attention_top_k=16"),
    "saved-tensor offload": ("memory.saved_tensor_offload=true",),
    "optimizer in backward": ("memory.optimizer_in_backward=true",),
    "optimizer adamw_foreach": ("optimizer=adamw_foreach",),
    "optimizer adafactor": ("optimizer=adafactor",),
    "optimizer sgd": ("optimizer=sgd",),
    "optimizer adamw_8bit": ("optimizer=adamw_8bit",),
    "forward in 4 chunks": ("memory.forward_chunks=4",),
    "forward in 4 chunks, training too": (
        "memory.forward_chunks=4",
        "memory.forward_chunks_in_training=true",
    ),
}
EVALUATED = (PLAIN, "forward in 4 chunks")
"""Rows whose evaluation is measured: no other technique changes it."""
CUDA_ONLY = ("saved-tensor offload",)
NEEDS = {"optimizer adamw_8bit": "bitsandbytes"}
TIMED_STEPS = 2
GIB = 1024**3


def predicted_peak_bytes(device: str, *overrides: str) -> int:
    """Return the peak that the plan predicts for a training step."""
    from expt.run.build import build
    from expt.run.planner import plan_training

    settings = settings_for(*overrides)
    target: Any = device
    return plan_training(settings, build(settings, "data"), target, evaluation=False).peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--predict", action="store_true", help="predict stored rows again")
    parser.add_argument("--row", nargs=2, metavar=("PRESET", "TECHNIQUE"))
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(*arguments.row, arguments.device)))
        return
    record = {"rows": {}, **load("techniques")}
    if arguments.predict:
        for name, row in record["rows"].items():
            try:
                predicted = predicted_peak_bytes(row["device"], *row["overrides"])
            except UserError as error:  # an optional package
                print(f"{name}: not predicted: {error}")
                continue
            row["predicted_peak_bytes"] = predicted
            print(name, f"{100 * (row['predicted_peak_bytes'] / row['peak_bytes'] - 1):+.2f} %")
        store("techniques", record, tables(record))
        return
    for preset in arguments.presets:
        for technique in ROWS:
            name = f"{preset} | {technique} | {arguments.device}"
            if not measurable(technique, arguments.device):
                continue
            if name in record["rows"] and not arguments.again:
                continue
            print(name, flush=True)
            command = [sys.executable, __file__, "--device", arguments.device, "--row"]
            done = subprocess.run(
                [*command, preset, technique], stdout=subprocess.PIPE, text=True, check=True
            )
            record["rows"][name] = json.loads(done.stdout.splitlines()[-1])
            record["made"] = provenance()
            store("techniques", record, tables(record))


def measurable(technique: str, device: str) -> bool:
    """Tell whether a row can be had here; says so if not."""
    package = NEEDS.get(technique)
    if package is not None and importlib.util.find_spec(package) is None:
        print(f"{technique}: {package} is not installed, row left out")
        return False
    return device == "cuda" or technique not in CUDA_ONLY


def measure(preset: str, technique: str, device: str) -> dict[str, Any]:
    """Return peak bytes of training and evaluation, and seconds per step."""
    if device == "cpu":
        torch.set_num_threads(1)
    overrides = (*PRESETS[preset], *COMMON, *ROWS[technique], f"trainer.device={device}")
    trainer = make_trainer(*overrides)
    trainer.model.train()
    batch = trainer.batches.of(torch.arange(trainer.data.batch_size))
    trainer.meter.start_epoch()
    for _ in range(2):
        with trainer.meter.step():
            trainer.train_step(batch)
    row = {
        "preset": preset,
        "technique": technique,
        "device": device,
        "overrides": list(overrides),
        "batch_size": trainer.data.batch_size,
        "meter": trainer.meter.name,
        "peak_bytes": trainer.meter.peak_allocated_bytes(),
        "seconds_per_step": seconds_per_step(trainer, batch),
    }
    if technique in EVALUATED:
        row["evaluation_peak_bytes"] = evaluation_peak_bytes(trainer)
    row["predicted_peak_bytes"] = predicted_peak_bytes(device, *overrides)
    return row


def seconds_per_step(trainer: Any, batch: Any) -> float:
    """Return the quickest of a few steps; on the CPU its own time on one thread, not the clock's.

    Other work on the machine then adds little.
    """
    on_cuda = trainer.fabric.device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    times = []
    for _ in range(TIMED_STEPS):
        start = clock()
        trainer.train_step(batch)
        if on_cuda:
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


@torch.no_grad()
def evaluation_peak_bytes(trainer: Any) -> int | None:
    """Return the peak of one evaluation batch, in a meter of its own."""
    from expt.memory.measuring.meter import meter_for

    meter = meter_for(trainer.fabric.device)
    meter.start_epoch()
    trainer.model.eval()
    indices = torch.arange(trainer.data.eval_batch_size, device=trainer.fabric.device)
    with meter.evaluation():
        trainer.model(**trainer.data.gather("val", indices).inputs)
    return meter.peak_allocated_bytes()


def tables(record: dict[str, Any]) -> str:
    """Return one table per preset and device."""
    parts = []
    groups = sorted({(row["preset"], row["device"]) for row in record["rows"].values()})
    for preset, device in groups:
        rows = [
            row
            for technique in ROWS
            if (row := record["rows"].get(f"{preset} | {technique} | {device}")) is not None
        ]
        plain = next((row for row in rows if row["technique"] == PLAIN), None)
        if plain is None:
            continue
        precision = "bf16" if "memory.precision=bf16" in plain["overrides"] else "fp32"
        parts.append(
            f"`{preset}` at 207 sensors, {precision}, batch {plain['batch_size']}, on {device}:\n"
        )
        # Only where a plan was asked; a column of nothing would look like a figure.
        predicted = any("predicted_peak_bytes" in row for row in rows)
        columns = [
            "technique",
            "peak of a step",
            "saving",
            "CPU time" if device == "cpu" else "time",
        ]
        columns += ["saving, predicted"] if predicted else []
        columns += ["peak of evaluation"]
        parts.append(markdown(columns, [cells(row, plain, predicted) for row in rows]))
    return "\n".join(parts) + "\n" + source_line(record, "techniques")


def cells(row: dict[str, Any], plain: dict[str, Any], predicted: bool) -> list[str]:
    """Return one row, as shares of the plain row's."""
    found = [
        row["technique"],
        f"{row['peak_bytes'] / GIB:.3f} GiB",
        saving(row["peak_bytes"], plain["peak_bytes"]),
        f"x{row['seconds_per_step'] / plain['seconds_per_step']:.2f}",
    ]
    if predicted:
        known = "predicted_peak_bytes" in row and "predicted_peak_bytes" in plain
        found.append(
            saving(row["predicted_peak_bytes"], plain["predicted_peak_bytes"]) if known else "-"
        )
    evaluation = row.get("evaluation_peak_bytes")
    found.append("as plain" if evaluation is None else f"{evaluation / GIB:.3f} GiB")
    return found


def saving(peak: int, plain: int) -> str:
    return f"{100 * (1 - peak / plain):.1f} %"


if __name__ == "__main__":
    main()
