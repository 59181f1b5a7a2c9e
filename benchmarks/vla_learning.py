"""What the vision-language-action job learns: success in the simulator, by stage and seed."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, markdown, run_expt
from vla_plans import PICTURES

SEEDS = (0, 1, 2)
STAGE_1 = ("experiment=vla", "+memory=lite", "model.rank=0")
STAGE_2 = ("experiment=vla", "+memory=lite", "trainer.epochs=3")
FEATURES = f"memory.feature_cache_folder={ROOT}/outputs/cache/features"


def runs() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return both stages of each seed; a seed's stages are one row."""
    return {f"state, seed {seed}": partial(stages, seed) for seed in SEEDS} | {
        "pictures, seed 0": partial(seen, 0)
    }


def stages(seed: int) -> dict[str, Any]:
    """Return what the two stages reach, trained one after the other."""
    common = (f"trainer.seed={seed}", FEATURES)
    with tempfile.TemporaryDirectory() as folder:
        first = trained((*STAGE_1, *common), f"{folder}/first")
        second = trained(
            (*STAGE_2, *common, f"trainer.start_from={folder}/first"), f"{folder}/second"
        )
    return {"stage 1": first, "stage 2": second}


def seen(seed: int) -> dict[str, Any]:
    """Return what stage 1 reaches with pictures."""
    lines = (*STAGE_1, "data=metaworld", f"data.path={PICTURES.parent}/metaworld", FEATURES)
    with tempfile.TemporaryDirectory() as folder:
        return {"stage 1": trained((*lines, f"trainer.seed={seed}"), f"{folder}/first")}


def trained(lines: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Return a run's figures and how often its policy succeeds."""
    run_expt(*lines, f"hydra.run.dir={folder}")
    result = json.loads((Path(folder) / "result.json").read_text())
    run_expt(
        "task=rollout", f"rollout.run={folder}", "rollout.seeds=10", "rollout.videos=0",
        f"hydra.run.dir={folder}-rollout",
    )  # fmt: skip
    acted = json.loads((Path(f"{folder}-rollout") / "rollout.json").read_text())["metrics"]
    return {
        "l1": result["metrics"]["test/l1"],
        "seconds": result["seconds"],
        "memory": result["memory"],
        "rollout": acted,
    }


def by_task(acted: Mapping[str, float], figure: str) -> str:
    """Return a figure of each task, in their order."""
    return ", ".join(f"{v:.1f}" for name, v in acted.items() if name.startswith(f"{figure}_"))


def table(rows: Mapping[str, Any]) -> str:
    body = []
    for name, row in rows.items():
        for stage, found in row.items():
            if not stage.startswith("stage"):
                continue
            acted = found["rollout"]
            body.append(
                (
                    name,
                    stage,
                    f"{found['l1']:.4f}",
                    f"{acted['success']:.2f}",
                    f"{acted['exchanged']:.2f}",
                    by_task(acted, "success"),
                    by_task(acted, "exchanged"),
                    f"{found['seconds'] / 60:.1f} min" if found["seconds"] else "-",
                )
            )
    columns = (
        "data", "stage", "test L1", "success", "sentences exchanged", "by task",
        "by task, exchanged", "training",
    )  # fmt: skip
    means = {
        stage: [
            r[stage]["rollout"]["success"] for n, r in rows.items() if stage in r and "state" in n
        ]
        for stage in ("stage 1", "stage 2")
    }
    said = "; ".join(
        f"{stage}: {statistics.mean(values):.2f}" for stage, values in means.items() if values
    )
    return (
        "Success over four MetaWorld tasks (reach, push, drawer-open, button-press), 10 unseen "
        f"scenes each. Mean from state and sentence, {said}.\n\n"
    ) + markdown(columns, body)
