"""``data.batch_size=auto``: before a training, the largest batch that is predicted to fit.

A step's batch is the largest micro-batch that fits, times `memory.gradient_accumulation`, up to
`fit.max_batch` and the training set. It is found once: the number takes the place of the word in
all that is recorded of the run, and a run that is resumed goes on with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from expt.construction import RunContext, Settings, build
from expt.errors import ConfigError
from expt.fitting import fit, with_batch_size
from expt.memory.measuring.budget import Budget
from expt.memory.planning.planning import Target
from expt.protocols import DataSet
from expt.results import load_launch
from expt.tasks.room import too_small_for_weights
from expt.units import format_bytes

KEY = "data.batch_size"
_GIVEN = re.compile(rf"(\+*{re.escape(KEY)})=(.*)")


def with_batch_found(
    cfg: DictConfig, settings: Settings, context: RunContext, device: torch.device
) -> tuple[DictConfig, Settings, RunContext]:
    """Return all three with a number as the batch size; unchanged if they have one.

    Raises:
        ConfigError: not even one sample fits, or no prediction can be made.

    """
    if not settings.batch_is_auto:
        return cfg, settings, context
    batch_size = _earlier(context.run_dir) or _found(with_batch_size(settings, 1), device)
    cfg = OmegaConf.masked_copy(cfg, list(map(str, cfg)))
    cfg.data = {**cfg.data, "batch_size": batch_size}
    lines = list(_replaced(context.launch.get("overrides", ()), batch_size))
    context = replace(context, launch={**context.launch, "overrides": lines})
    return cfg, with_batch_size(settings, batch_size), context


def _found(settings: Settings, device: torch.device) -> int:
    """Search for the largest batch, and say what was found."""
    data: DataSet = build(settings, "data")
    budget = Budget.parse(
        "auto" if settings.memory.budget is None else settings.memory.budget, device
    )
    refusal = too_small_for_weights(budget, settings, data)
    if refusal is not None:
        raise ConfigError(refusal)
    target: Target = "cuda" if device.type == "cuda" else "cpu"
    found = fit(settings, data, target, budget.bytes, batch_size=None)
    print(
        f"data.batch_size=auto: {found.batch_size} (micro-batch {found.micro_batch}, predicted "
        f"peak {format_bytes(found.planned.peak_bytes)}, limited by {found.limited_by})"
    )
    return found.batch_size


def _earlier(run_dir: Path) -> int | None:
    """Return the batch size that the first part of a run was started with, if there is one."""
    launch = load_launch(run_dir)
    given = [_GIVEN.fullmatch(line) for line in (launch or {}).get("overrides", ())]
    numbers = [int(found[2]) for found in given if found and found[2].isdigit()]
    return numbers[-1] if numbers else None


def _replaced(lines: Iterable[str], batch_size: int) -> Iterable[str]:
    """Yield a command line's settings with the number that was found."""
    names = []
    for line in lines:
        found = _GIVEN.fullmatch(line)
        names += [found[1]] if found else []
        if not found:
            yield line
    yield f"{names[-1] if names else KEY}={batch_size}"
