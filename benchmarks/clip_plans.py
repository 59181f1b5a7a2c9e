"""Predicted peaks of the jobs on clips: against the profiler, and beside what the guides claim."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import make_trainer, markdown, run_expt, settings_for
from prediction import error, measure, peaks_table

GIB = 2**30
CPU = ("trainer.device=cpu", "loader.num_workers=0")
AT_224 = ("experiment=video", "model=r3d", "data.frames=16", "data.pixels=224", "data.batch_size=4")
FACES_224 = ("experiment=deepfake", "model=frame_sequence", "data.pixels=224")
PLAIN = ("memory.batch_norm=batch", "memory.forward_chunks=1")


def predictions() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return configurations whose plan is compared with the profiler, by name."""
    found: dict[str, tuple[str, ...]] = {}
    for job, preset, precision in itertools.product(
        ("video", "deepfake"), ("full", "lite", "minimal"), ("fp32", "bf16")
    ):
        found[f"{job} {preset} {precision}"] = (
            f"experiment={job}", f"+memory={preset}", f"memory.precision={precision}",
        )  # fmt: skip
    lite = ("experiment=video", "+memory=lite")
    for mode in ("true", "selective", "nested"):
        found[f"video lite checkpointing {mode}"] = (
            *lite, f"memory.activation_checkpointing={mode}",
        )  # fmt: skip
    for norm, parts in (("batch", 1), ("batch", 4), ("frozen", 2)):
        found[f"video lite norm {norm}, {parts} parts"] = (
            *lite, f"memory.batch_norm={norm}", f"memory.gradient_accumulation={parts}",
        )  # fmt: skip
    found["video lite keypoints"] = (*lite, "data.load_kpt=true")
    found["video lite normalised in the worker"] = (*lite, "data.preprocess_on=worker")
    for depth, frames, pixels, batch in (
        (18, 8, 112, 1), (18, 8, 112, 4), (18, 16, 112, 1), (50, 8, 112, 1), (50, 8, 64, 2),
    ):  # fmt: skip
        found[f"r3d{depth} {batch}x{frames}x{pixels}"] = (
            "experiment=video", "+memory=full", "model=r3d", f"model.depth={depth}",
            f"data.frames={frames}", f"data.pixels={pixels}", f"data.batch_size={batch}",
            f"data.eval_batch_size={batch}",
        )  # fmt: skip
    for depth, head in ((18, "gru"), (18, "transformer"), (50, "gru")):
        found[f"frames{depth} {head} 2x8x112"] = (
            "experiment=deepfake", "+memory=full", "model=frame_sequence", f"model.depth={depth}",
            f"model.head={head}", "data.frames=8", "data.pixels=112", "data.batch_size=2",
            "data.eval_batch_size=2",
        )  # fmt: skip
    return {name: partial(measure, overrides=(*lines, *CPU)) for name, lines in found.items()}


def prediction_table(rows: Mapping[str, Any]) -> str:
    gaps = sorted(abs(error(row)) for row in rows.values())
    inside = sum(
        row["interval_bytes"][0] <= row["measured_bytes"] <= row["interval_bytes"][1]
        for row in rows.values()
    )
    return (
        f"Predicted against measured peak of the jobs on clips, on the CPU, over {len(gaps)} "
        f"configurations: median error {100 * statistics.median(gaps):.2f} %, worst "
        f"{100 * gaps[-1]:.2f} %; {inside} of {len(gaps)} inside the plan's interval.\n\n"
    ) + peaks_table(rows)


def guides() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the rows of guide B's comparison and of guide D's presets."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    changes = {
        "baseline": ("memory.precision=fp32", "memory.gradient_accumulation=1"),
        "16 bit": ("memory.precision=bf16", "memory.gradient_accumulation=1"),
        "4 parts": ("memory.precision=fp32", "memory.gradient_accumulation=4"),
        "both": ("memory.precision=bf16", "memory.gradient_accumulation=4"),
    }
    for depth in (50, 18):
        for name, lines in changes.items():
            plain = (*AT_224, *PLAIN, f"model.depth={depth}", *lines)
            found[f"B r3d{depth} {name}"] = partial(planned, plain)
    for name, lines in changes.items():
        small = (
            "experiment=video", "+memory=full", "data.eval_batch_size=4", *PLAIN, *lines, *CPU,
        )  # fmt: skip
        found[f"B small {name}"] = partial(measured, small)
    for batch, frames, precision, depth in itertools.product(
        (12, 10, 6), (16, 24), ("fp32", "bf16"), (50, 18)
    ):
        lines = (
            *FACES_224, *PLAIN, f"model.depth={depth}", f"data.batch_size={batch}",
            f"data.frames={frames}", f"memory.precision={precision}",
        )  # fmt: skip
        found[f"D resnet{depth} {frames} frames {precision} batch {batch}"] = partial(
            planned, lines
        )
    for pixels, depth, precision in ((224, 50, "fp32"), (224, 50, "bf16"), (112, 18, "bf16")):
        lines = (
            *AT_224, "memory.batch_norm=batch", "memory.forward_chunks=8", f"model.depth={depth}",
            f"data.pixels={pixels}", f"memory.precision={precision}",
        )  # fmt: skip
        found[f"cards r3d{depth} {pixels} px {precision}"] = partial(cards, lines)
    return found


def planned(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return what a configuration is predicted to need on CUDA."""
    from expt.run.build import build
    from expt.run.planner import plan_training

    settings = settings_for(*lines)
    found = plan_training(settings, build(settings, "data"), "cuda", evaluation=False)
    return {
        "peak_bytes": found.peak_bytes,
        "reserved_bytes": found.reserved_bytes,
        "phase": found.phase,
    }


def measured(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return predicted and measured peak on the CPU, and the seconds of a step."""
    row = measure(overrides=lines)
    trainer = make_trainer(*lines, "trainer.compile=off")
    samples = trainer.batches.of(torch.arange(trainer.data.batch_size))
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        trainer.train_step(samples)
        seconds.append(time.perf_counter() - started)
    return {**row, "step_seconds": statistics.median(seconds[2:])}


def cards(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return what `task=cards` recommends for each card."""
    with tempfile.TemporaryDirectory() as folder:
        run_expt("task=cards", *lines, f"hydra.run.dir={folder}")
        return {"cards": json.loads((Path(folder) / "cards.json").read_text())["cards"]}


def guide_tables(rows: Mapping[str, Any]) -> str:
    return "\n".join(part for part in (_guide_b(rows), _guide_d(rows), _cards(rows)) if part)


CLAIMS_B = {
    "baseline": ("100 %", "1.0x"), "16 bit": ("50 %", "1.3x"), "4 parts": ("25 %", "0.9x"),
    "both": ("12.5 %", "1.2x"),
}  # fmt: skip


def _guide_b(rows: Mapping[str, Any]) -> str:
    wanted = [f"B {model} {name}" for model in ("r3d50", "r3d18", "small") for name in CLAIMS_B]
    if not all(name in rows for name in wanted):
        return ""
    body = []
    for name, (memory, speed) in CLAIMS_B.items():
        peaks = [(rows[f"B {m} {name}"], rows[f"B {m} baseline"]) for m in ("r3d50", "r3d18")]
        shares = [
            f"{100 * one['peak_bytes'] / whole['peak_bytes']:.1f} % "
            f"({one['peak_bytes'] / GIB:.2f} GiB)"
            for one, whole in peaks
        ]
        small, base = rows[f"B small {name}"], rows["B small baseline"]
        share = f"{100 * small['measured_bytes'] / base['measured_bytes']:.1f} %"
        body.append(
            (name, memory, *shares, share, speed,
             f"{base['step_seconds'] / small['step_seconds']:.2f}x")
        )  # fmt: skip
    columns = (
        "guide B", "claimed", "predicted, r3d50", "predicted, r3d18", "measured, small clips",
        "speed claimed", "speed measured, CPU",
    )  # fmt: skip
    text = (
        "Guide B's comparison: 4 clips of 16 frames of 224 px, predicted for CUDA; measured at the "
        "size of the shipped clips on a CPU, where 16 bit arithmetic is emulated.\n\n"
    )
    return text + markdown(columns, body)


def _guide_d(rows: Mapping[str, Any]) -> str:
    claims = {12: "11 GB", 10: "9 GB", 6: "7 GB"}
    body = []
    for depth, frames, precision in itertools.product((50, 18), (16, 24), ("fp32", "bf16")):
        names = [f"D resnet{depth} {frames} frames {precision} batch {batch}" for batch in claims]
        if all(name in rows for name in names):
            cells = [
                f"{rows[n]['peak_bytes'] / GIB:.2f} ({rows[n]['reserved_bytes'] / GIB:.2f}) GiB"
                for n in names
            ]
            body.append((f"ResNet-{depth}, {frames} frames, {precision}", *cells))
    if not body:
        return ""
    heads = [f"batch {batch} (claimed {claim})" for batch, claim in claims.items()]
    text = "Guide D's presets, predicted for CUDA: allocated (reserved), 224 px, GRU head.\n\n"
    return text + markdown(("frames", *heads), body)


def _cards(rows: Mapping[str, Any]) -> str:
    tables = []
    for name, row in rows.items():
        if not name.startswith("cards"):
            continue
        body = [
            (
                f"{card['card_gib']:g} GiB",
                f"{card['micro_batch']} x {card['gradient_accumulation']}",
                str(card["precision"]),
                str(card["activation_checkpointing"]).lower(),
                f"{card['peak_bytes'] / GIB:.2f} GiB",
                "yes" if card["fits"] else "no",
            )
            for card in row["cards"]
        ]
        columns = ("card", "batch", "precision", "checkpointing", "peak", "fits")
        tables.append(f"`task=cards`, {name.removeprefix('cards ')}:\n\n{markdown(columns, body)}")
    return "\n".join(tables)
