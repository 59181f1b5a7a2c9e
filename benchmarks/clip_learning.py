"""What the jobs on clips learn from the shipped sets, and whether they wait for their samples."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import markdown, run_expt

SEEDS = (0, 1, 2)
VIDEO = ("experiment=video", "+memory=lite")
DEEPFAKE = ("experiment=deepfake", "+memory=lite")
ONE_FRAME = ("data.frames=1", "data.clips_per_video=8")
JOBS: dict[str, tuple[str, ...]] = {
    "video": VIDEO,
    # The same network on single frames, whose scores are averaged over eight of a video.
    "video, single frame": (
        *VIDEO, *ONE_FRAME, "model.frame_difference=0", "model.stem_kernel=[1,5,5]",
    ),
    "video, minimal": ("experiment=video", "+memory=minimal"),
    "deepfake": DEEPFAKE,
    "deepfake, single frame": (*DEEPFAKE, *ONE_FRAME),
}  # fmt: skip
CHANCE = {"video": "1/6; 1/2 once the object is known", "deepfake": "0.5"}


def runs() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the trainings, by job and seed."""
    return {
        f"{name} seed {seed}": partial(trained, (*lines, f"trainer.seed={seed}"))
        for seed in SEEDS
        for name, lines in JOBS.items()
    }


def trained(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run_expt(*lines, f"hydra.run.dir={folder}")
        result = json.loads((Path(folder) / "result.json").read_text())
    return {name: result[name] for name in ("metrics", "seconds", "memory", "loader", "steps")}


def table(rows: Mapping[str, Any]) -> str:
    body = []
    for name in JOBS:
        found = of_seeds(rows, name)
        if not found:
            continue
        video = name.startswith("video")
        monitored = "accuracy" if video else "auc"
        more = ("accuracy_unseen_camera", "class_accuracy") if video else ("frame_auc", "eer")
        seconds = statistics.mean(row["seconds"] for row in found)
        body.append(
            (
                name,
                "accuracy" if video else "video AUC",
                spread([row["metrics"][f"test/{monitored}"] for row in found]),
                *(spread([row["metrics"].get(f"test/{m}") for row in found]) for m in more),
                f"{seconds / 60:.1f} min",
            )
        )
    columns = (
        "run", "figure", "test, seeds 0 1 2", "unseen camera / frame AUC",
        "mean class accuracy / EER", "time",
    )  # fmt: skip
    return (
        "Learned from the shipped clips, tested on seeds and rollouts that training has not seen. "
        f"Chance: {CHANCE['video']} (video), {CHANCE['deepfake']} (deepfake).\n\n"
    ) + markdown(columns, body)


def of_seeds(rows: Mapping[str, Any], name: str) -> list[Any]:
    """Return the rows of a run, by seed, that there are."""
    return [rows[f"{name} seed {seed}"] for seed in SEEDS if f"{name} seed {seed}" in rows]


def spread(values: list[float | None]) -> str:
    """Return the mean and every value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    each = ", ".join(f"{value:.3f}" for value in known)
    return f"{statistics.mean(known):.3f} ({each})"


def loaders() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return runs that show who waits for whom, and that memory does not grow."""
    short = (*VIDEO, "trainer.epochs=3", "trainer.test=false")
    large = ("data.resize=512", "data.preprocess_on=worker")
    return {
        "video, 2 workers": partial(loaded, (*short, "loader.num_workers=2")),
        "video, read by the process that trains": partial(loaded, (*short, "loader.num_workers=0")),
        "deepfake, 2 workers": partial(
            loaded, (*DEEPFAKE, "trainer.epochs=3", "trainer.test=false", "loader.num_workers=2")
        ),
        "video, frames scaled up to 512 px, 1 worker": partial(
            loaded, (*short, *large, "loader.num_workers=1")
        ),
        "soak: 2000 steps, 2 workers": soak,
    }


def loaded(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return what a run says of its loader."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run_expt(*lines, f"hydra.run.dir={folder}")
        result = json.loads((Path(folder) / "result.json").read_text())
    verdict = next((line for line in printed.splitlines() if line.startswith("bound by")), None)
    return {**result["loader"], "said": verdict}


def soak() -> dict[str, Any]:
    """Return the host memory of a run and its workers at a quarter, and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        run_expt(
            "experiment=video", "+memory=minimal", "trainer.epochs=170", "trainer.max_steps=2000",
            "trainer.test=false", "loader.num_workers=2", "loader.persistent_workers=true",
            "trainer.eval_batches=1", "memory.gradient_accumulation=1",
            f"hydra.run.dir={folder}",
        )  # fmt: skip
        result = json.loads((Path(folder) / "result.json").read_text())
        lines = (Path(folder) / "memory.csv").read_text().splitlines()
    heads, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    return {"steps": result["steps"], "loader": result["loader"], "readings": len(rows),
            **growth(heads, rows)}  # fmt: skip


def growth(heads: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """Return the process's memory after the first quarter and in the last tenth, by reading."""
    device, column = heads.index("device"), heads.index("allocated_bytes")
    values = [float(row[column]) for row in rows if row[device] == "host" and row[column]]
    quarter, tenth = len(values) // 4, max(len(values) // 10, 1)
    early = statistics.median(values[quarter : quarter + tenth])
    return {"early": early, "late": statistics.median(values[-tenth:])}


def loader_table(rows: Mapping[str, Any]) -> str:
    body = [
        (
            name,
            f"{row['ratio']:.3f}",
            row["verdict"],
            (row["said"] or "").partition("What would help: ")[2] or "-",
            f"{row['worker_bytes'] / 2**20:.0f} MiB" if row["worker_bytes"] else "-",
        )
        for name, row in rows.items()
        if "ratio" in row
    ]
    columns = ("run", "step with its wait over step", "verdict", "advice", "workers' memory")
    text = "Time of a step with the wait for its samples, over the time without.\n\n"
    text += markdown(columns, body)
    long = rows.get("soak: 2000 steps, 2 workers")
    if long:
        text += (
            f"\nA run of {long['steps']} steps with 2 workers: the process takes "
            f"{long['early'] / 2**20:.0f} MiB after a quarter, {long['late'] / 2**20:.0f} MiB at "
            "the end.\n"
        )
    return text
