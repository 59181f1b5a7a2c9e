"""`memory.fallback=preset`: when nothing fits, a new run of the next smaller size.

full → lite → minimal → the model ``phase1`` at minimal's sizes. The new run is in a folder beside
the first, is composed like the first one was, and both say in their records where the other is.
What was set by name on the first command line (``model.embed_dim=96``) stays set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig

from expt.config.schema import Fallback, Preset
from expt.config.settings import RunContext, Settings
from expt.result import RunResult, load_launch

SIZES = ("full", "lite", "minimal", "phase1")
"""From the largest; the last is a model of its own."""
CONFIG_NAME = "config"


def next_size(settings: Settings) -> str | None:
    """Return the size that comes after a run's, None if there is none or none is wanted."""
    if settings.memory.fallback is Fallback.none:
        return None
    if str(settings.arguments["model"]["_target_"]).endswith(".Phase1"):
        return None
    preset = settings.memory.preset or Preset.lite  # what the sizes are without a preset
    return SIZES[SIZES.index(preset.value) + 1]


def folder(run_dir: Path, size: str) -> Path:
    """Return the directory of the run that takes over."""
    return run_dir.with_name(f"{run_dir.name}-{size}")


def smaller_run(context: RunContext, size: str, first: RunResult) -> tuple[DictConfig, RunContext]:
    """Compose the run that takes over from `first`, which ended for lack of memory."""
    run_dir = folder(context.run_dir, size)
    dropped = {"memory", "trainer.resume"}
    lines = [line for line in context.launch["overrides"] if key(line) not in dropped]
    if size == "phase1":
        # Settings of one model mean nothing to another.
        lines = [line for line in lines if key(line).partition(".")[0] != "model"]
        lines += ["model=phase1", "+memory=minimal"]
    else:
        lines.append(f"+memory={size}")
    resuming = ["trainer.resume=true"] if load_launch(run_dir) is not None else []
    cfg = compose(CONFIG_NAME, overrides=[*lines, *resuming])
    smaller = replace(
        context,
        run_dir=run_dir,
        overridden=frozenset(key(line) for line in lines),
        launch={**context.launch, "overrides": lines},
        fallback_of={
            "fallback_of": str(context.run_dir),
            "fallback_of_run_id": first.tracking["run_id"] or "",
        },
    )
    return cfg, smaller


def key(override: str) -> str:
    """Return the dotted key of a command line's setting."""
    return override.partition("=")[0].lstrip("+~")
