"""`memory.fallback`: when nothing fits, a new run with the next of a list of smaller settings.

The list is `memory.fallback` itself, or `memory.fallback_settings` of the experiment where that is
``preset``: for traffic full, then lite, then minimal, then the model ``phase1`` at minimal's
sizes. The new run is in a folder beside the first, is composed like the first one was, and both
say in their records where the other is. What was set by name on the first command line
(``model.embed_dim=96``) stays set, except the settings of a model that another one replaces.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig

from expt.config.compose import CONFIG_NAME, key
from expt.config.schema import Preset
from expt.config.settings import RunContext, Settings
from expt.result import RunResult, load_launch


def next_smaller(settings: Settings, context: RunContext) -> str | None:
    """Return the setting that comes after a run's own, None if there is none or none is wanted."""
    entries = settings.memory.smaller_runs
    reached = [n for n, entry in enumerate(entries) if _holds(entry, settings, context)]
    left = entries[max(reached, default=-1) + 1 :]
    return left[0] if left else None


def short_name(entry: str) -> str:
    """Return a setting as a part of a folder's name: ``lite``, ``data.batch_size-4``."""
    name, _, value = entry.lstrip("+").partition("=")
    return re.sub(r"[^\w.]+", "-", f"{name}-{value}" if "." in name else value).strip("-")


def folder(run_dir: Path, entry: str) -> Path:
    """Return the directory of the run that takes over."""
    return run_dir.with_name(f"{run_dir.name}-{short_name(entry)}")


def smaller_run(
    settings: Settings, context: RunContext, entry: str, first: RunResult
) -> tuple[DictConfig, RunContext]:
    """Compose the run that takes over from `first`, which ended for lack of memory."""
    run_dir = folder(context.run_dir, entry)
    entries = settings.memory.smaller_runs
    chosen = {key(one): one for one in entries[: entries.index(entry) + 1]}
    # Settings of one model mean nothing to another.
    replaced = [name for name in chosen if "." not in name and name != "memory"]
    lines = [
        line
        for line in context.launch["overrides"]
        if key(line) not in {*chosen, "trainer.resume"}
        and key(line).partition(".")[0] not in replaced
    ]
    lines += chosen.values()
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


def _holds(entry: str, settings: Settings, context: RunContext) -> bool:
    """Tell whether a run was composed with a setting."""
    name, value = key(entry), entry.partition("=")[2]
    if name == "memory":
        preset = settings.memory.preset or Preset.lite  # what the sizes are without a preset
        return preset.value == value
    given = [line.partition("=")[2] for line in context.launch["overrides"] if key(line) == name]
    return bool(given) and given[-1] == value
