"""Seconds per optimizer step against the number of sensors and the batch size.

All cells are measured in one process, in rounds over all of them, so that a busy machine slows
all alike; a cell's figure is the median over rounds. 29 sensors are those of `metr_la_29`, 207
those of `metr_la_week`; 67 come from a file of the user's, else from the first of the week's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_trainer
from rival_loops import now

MIDDLE = 67
WEEK = Path(str(files("expt.jobs.traffic") / "files" / "metr_la_week.npz"))


def measure(
    presets: Sequence[str],
    sensors: Sequence[int],
    batches: Sequence[int],
    device: str,
    rounds: int,
    steps: int,
    middle: Path | None,
) -> dict[str, Any]:
    """Return one row per preset, number of sensors and batch size."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            29: ["data=metr_la_29"],
            MIDDLE: ["data=traffic", f"data.path='{middle or cut(Path(folder))}'"],
            207: ["data=metr_la_week"],
        }
        cells = {
            (preset, count, batch): make_trainer(
                f"+memory={preset}",
                *sources[count],
                f"data.batch_size={batch}",
                f"trainer.device={device}",
            )
            for preset in presets
            for count in sensors
            for batch in batches
        }
    times: dict[tuple[str, int, int], list[float]] = {cell: [] for cell in cells}
    for number in range(rounds + 1):  # the first round makes the optimizer's state
        for cell, trainer in cells.items():
            seconds = step_seconds(trainer, 1 if number == 0 else steps)
            if number > 0:
                times[cell].append(seconds)
    return {
        "rows": [
            {
                "preset": preset,
                "sensors": count,
                "batch_size": batch,
                "seconds_per_step": statistics.median(values),
                "rounds": values,
            }
            for (preset, count, batch), values in times.items()
        ],
        "middle": "a file of 67 sensors" if middle else "67 sensors of metr_la_week",
    }


def step_seconds(trainer: Any, steps: int) -> float:
    trainer.model.train()
    samples = trainer.batches.of(torch.arange(trainer.data.batch_size))
    start = now(trainer.fabric.device)
    for _ in range(steps):
        trainer.train_step(samples)
    return (now(trainer.fabric.device) - start) / steps


def cut(folder: Path) -> Path:
    """Write the first 67 sensors of the week's file into `folder`."""
    path = folder / f"week_{MIDDLE}.npz"
    with np.load(WEEK) as week:
        np.savez(path, speed=week["speed"][:, :MIDDLE], timestamps=week["timestamps"])
    return path


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the cost per step over sensors, a panel per preset and a line per batch size."""
    from matplotlib.figure import Figure

    from expt.files import replace_atomically

    rows = result["rows"]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure = Figure(figsize=(4.2 * len(presets), 3.8), layout="constrained")
    panels = figure.subplots(1, len(presets), sharey=True, squeeze=False)[0]
    counts = sorted({row["sensors"] for row in rows})
    for axes, preset in zip(panels, presets, strict=True):
        for number, batch in enumerate(sorted({row["batch_size"] for row in rows})):
            line = sorted(
                (row["sensors"], row["seconds_per_step"])
                for row in rows
                if (row["preset"], row["batch_size"]) == (preset, batch)
            )
            x, y = zip(*line, strict=True)
            axes.loglog(x, y, "o-", color=f"C{number}", linewidth=1.2, label=f"batch {batch}")
        axes.set(title=f"alternating, {preset}", xlabel="sensors")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds per step")
    panels[-1].legend(frameon=False)
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
