"""What keeping features changes: nothing in the losses, and the seconds of an epoch."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import make_trainer, markdown, run_expt
from vla_plans import pictures

RUN = (
    "experiment=vla", "data=metaworld", "+memory=lite", "trainer.epochs=4", "data.batch_size=16",
    "memory.gradient_accumulation=2", "memory.activation_checkpointing=false", "trainer.test=false",
    "trainer.device=cpu", "loader.num_workers=0", "trainer.deterministic=true", "memory.plan=false",
    "data.stride=4",
)  # fmt: skip
MODES = {
    "live": ("memory.feature_cache=off",),
    "prefix": ("memory.feature_cache=prefix",),
    "prefix in fp16": ("memory.feature_cache=prefix", "memory.feature_cache_dtype=fp16"),
    "vision": ("memory.feature_cache=vision",),
    "alternating, live every second epoch": (
        "memory.feature_cache=alternating", "memory.feature_cache_rebuild_interval=2",
    ),
}  # fmt: skip


def runs() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return one training by each mode."""
    where = pictures()
    return {name: partial(trained, (*RUN, where, *lines)) for name, lines in MODES.items()}


def trained(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return the losses of a training's epochs, a hash of its weights, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run_expt(
            *lines, f"hydra.run.dir={folder}/run", f"memory.feature_cache_folder={folder}/features",
            OMP_NUM_THREADS="1",
        )  # fmt: skip
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
        last = Path(folder) / "run" / "checkpoints" / "last.pt"
        history = torch.load(last, weights_only=True)["progress"]["history"]
    return {
        "train_losses": [epoch["loss"] for epoch in history],
        "val_l1": [epoch["val"] for epoch in history],
        "weights_sha256": result["weights_sha256"],
        "seconds": result["seconds"],
        "feature_cache": result["feature_cache"],
    }


def table(rows: Mapping[str, Any]) -> str:
    live = rows.get("live")
    body = []
    for name, row in rows.items():
        gap = "-"
        if live:
            pairs = zip(row["train_losses"], live["train_losses"], strict=True)
            gap = f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}"
        cache = row["feature_cache"] or {}
        building = cache.get("seconds") or 0.0
        same = "yes" if live and row["val_l1"] == live["val_l1"] else "no"
        body.append(
            (
                name,
                gap,
                same,
                f"{row['seconds'] / len(row['train_losses']):.1f} s",
                f"{building:.1f} s" if building else "-",
            )
        )
    columns = (
        "mode", "largest difference of an epoch's loss", "same validation", "an epoch", "making it",
    )  # fmt: skip
    return (
        "Four epochs on demonstrations with pictures, LoRA in the two upper layers, fp32, one "
        "thread: features kept against live.\n\n"
    ) + markdown(columns, body)


def costs() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the time of a step with and without checkpointing, by micro-batch."""
    where = pictures()
    common = (
        "experiment=vla", "data=metaworld", where, "+memory=full", "memory.feature_cache=off",
        "trainer.device=cpu", "loader.num_workers=0", "trainer.compile=off",
        "memory.gradient_accumulation=1", "data.batch_size=16",
    )  # fmt: skip
    return {
        "without": partial(timed, (*common, "memory.activation_checkpointing=false")),
        "checkpointed": partial(timed, (*common, "memory.activation_checkpointing=true")),
    }


def timed(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return the CPU seconds of a step, the least of several."""
    trainer = make_trainer(*lines)
    samples = trainer.batches.of(torch.arange(16))
    seconds = []
    for _ in range(6):
        started = time.process_time()
        trainer.train_step(samples)
        seconds.append(time.process_time() - started)
    trainer.batches.close()
    return {"step_seconds": min(seconds[1:])}


def cost_table(rows: Mapping[str, Any]) -> str:
    if len(rows) < 2:
        return ""
    plain, again = (rows[name]["step_seconds"] for name in ("without", "checkpointed"))
    return (
        f"Checkpointing's cost in time, a step of 16 samples on the CPU: {1000 * plain:.0f} ms "
        f"without, {1000 * again:.0f} ms with it, so {100 * (1 - plain / again):.0f} % fewer "
        "samples a second (claimed: 20 %).\n"
    )
