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
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import CONFIG_NAME, key, prepare_arguments
from expt.config.schema import Preset
from expt.config.settings import RunContext, Settings
from expt.errors import ConfigError, first_line
from expt.result import RunResult, load_launch


def next_smaller(settings: Settings, context: RunContext) -> str | None:
    """Return the setting to try after this run, None if there is none or none is wanted.

    A run that took over goes on in the list after its own entry. A first run begins after the
    last entry that it was composed with, and never takes a larger number than it has.
    """
    entries = settings.memory.smaller_runs
    before = context.fallback_of.get("fallback_entry")
    if before in entries:
        left = entries[entries.index(before) + 1 :]
    else:
        reached = [n for n, entry in enumerate(entries) if _holds(entry, settings, context)]
        left = entries[max(reached, default=-1) + 1 :]
    return next((entry for entry in left if not _is_larger(entry, context)), None)


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
    resuming = ["trainer.resume=true"] if load_launch(run_dir) is not None else []
    cfg, lines = _composed(settings, context, entry, *resuming)
    smaller = replace(
        context,
        run_dir=run_dir,
        overridden=frozenset(key(line) for line in lines),
        launch={**context.launch, "overrides": lines},
        fallback_of={
            "fallback_of": str(context.run_dir),
            "fallback_entry": entry,
            "fallback_of_run_id": first.tracking["run_id"] or "",
        },
    )
    return cfg, smaller


def check_entries(settings: Settings, context: RunContext) -> None:
    """Compose every smaller run before the first one starts.

    Raises:
        ConfigError: a setting of `memory.fallback` cannot be composed.

    """
    problems = []
    for entry in settings.memory.smaller_runs:
        try:
            _composed(settings, context, entry)
        except (HydraException, OmegaConfBaseException, ConfigError) as error:
            problems.append(f"memory.fallback: {entry} cannot be composed: {first_line(error)}")
    if problems:
        raise ConfigError(problems)


def _composed(
    settings: Settings, context: RunContext, entry: str, *more: str
) -> tuple[DictConfig, list[str]]:
    """Return the configuration of the run that an entry makes of this one, and its lines."""
    entries = settings.memory.smaller_runs
    chosen = {key(one): one for one in entries[: entries.index(entry) + 1]}
    # Settings of one model mean nothing to another.
    replaced = [name for name in chosen if "." not in name and name != "memory"]
    lines = [
        line
        for line in context.launch.get("overrides", ())
        if key(line) not in {*chosen, "trainer.resume"}
        and key(line).partition(".")[0] not in replaced
    ]
    lines += chosen.values()
    return compose(CONFIG_NAME, overrides=prepare_arguments([*lines, *more])), lines


def _holds(entry: str, settings: Settings, context: RunContext) -> bool:
    """Tell whether a run was composed with a setting."""
    name, value = key(entry), entry.partition("=")[2]
    if name == "memory":
        preset = settings.memory.preset or Preset.lite  # what the sizes are without a preset
        return preset.value == value
    return _given(name, context) == value


def _is_larger(entry: str, context: RunContext) -> bool:
    """Tell whether an entry's number is at least the one that the command line gave."""
    given, value = _given(key(entry), context), entry.partition("=")[2]
    try:
        return given is not None and float(value) >= float(given)
    except ValueError:
        return False


def _given(name: str, context: RunContext) -> str | None:
    """Return the value that the command line gave to a setting, None if it gave none."""
    given = [
        line.partition("=")[2] for line in context.launch.get("overrides", ()) if key(line) == name
    ]
    return given[-1] if given else None
