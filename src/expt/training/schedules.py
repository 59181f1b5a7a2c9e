"""Learning-rate schedules as a factor of the base rate, a pure function of progress.

A pure function has no state to lose: a resumed run has the same rate at the same step.

A run that ended with its schedule and is extended has a new one over the added steps: ``cosine``
and ``one_cycle`` begin again, with their warm-up (warm restarts: Loshchilov and Hutter,
arXiv:1608.03983); ``constant`` stays, and ``step`` keeps the rate it had come down to. One that was
stopped before (early stopping, a time limit) goes on in the schedule that it had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from expt.config.schema import TrainerConfig

START_FACTOR = 0.04
"""Rate at the first step of a warm-up, as a part of the peak (torch's OneCycleLR: 1/25)."""
END_FACTOR = 0.01
"""Rate at the end of an annealing, as a part of the peak."""


def of(settings: TrainerConfig, extended: bool) -> Callable[[float], float]:
    """Return the function that the settings ask for; see `factor`."""
    return factor(
        settings.schedule.value,
        settings.warmup_fraction,
        settings.step_milestones,
        settings.step_factor,
        extended,
    )


def factor(
    name: str,
    warmup_fraction: float,
    milestones: Sequence[float],
    decay: float,
    extended: bool = False,
) -> Callable[[float], float]:
    """Return the function from progress in [0, 1] to the rate's factor.

    Args:
        name: ``constant``; ``cosine``, a linear warm-up and a half cosine down; ``one_cycle``,
            a cosine up and a cosine down (Smith and Topin, arXiv:1708.07120); ``step``, times
            `decay` at every milestone.
        warmup_fraction: part of the run spent going up, for ``cosine`` and ``one_cycle``.
        milestones: fractions of the run, for ``step``.
        decay: factor at each milestone, for ``step``.
        extended: whether the progress is that of the steps added to a run that had ended.

    Raises:
        ValueError: `name` is none of these.

    """
    if name == "constant":
        return lambda progress: 1.0
    if name == "step" and extended:
        return lambda progress: decay ** len(milestones)
    if name == "step":
        return lambda progress: decay ** sum(progress >= at for at in milestones)
    if name not in ("cosine", "one_cycle"):
        raise ValueError(f"unknown schedule {name!r}")

    def annealed(progress: float) -> float:
        if progress < warmup_fraction:
            risen = progress / warmup_fraction
            if name == "one_cycle":
                risen = (1 - math.cos(math.pi * risen)) / 2
            return START_FACTOR + (1 - START_FACTOR) * risen
        fallen = min(1.0, (progress - warmup_fraction) / (1 - warmup_fraction))
        return END_FACTOR + (1 - END_FACTOR) * (1 + math.cos(math.pi * fallen)) / 2

    return annealed


EXTENDED = {
    "constant": "stays",
    "step": "keeps the rate that it came down to",
    "cosine": "begins again over them",
    "one_cycle": "begins again over them",
}
"""What becomes of a schedule over the steps that are added to a run."""


def extension_words(name: str, steps: int) -> str:
    """Say how a schedule goes on over the steps that are added to a run."""
    return f"{steps} steps more than the run had; the schedule {name} {EXTENDED[name]}"
