"""Learning-rate schedules as a factor of the base rate, a pure function of progress.

A pure function has no state to lose: a resumed run has the same rate at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

START_FACTOR = 0.04
"""Rate at the first step of a warm-up, as a part of the peak (torch's OneCycleLR: 1/25)."""
END_FACTOR = 0.01
"""Rate at the end of an annealing, as a part of the peak."""


def factor(
    name: str, warmup_fraction: float, milestones: Sequence[float], decay: float
) -> Callable[[float], float]:
    """Return the function from progress in [0, 1] to the rate's factor.

    Args:
        name: ``constant``; ``cosine``, a linear warm-up and a half cosine down; ``one_cycle``,
            a cosine up and a cosine down (Smith and Topin, arXiv:1708.07120); ``step``, times
            `decay` at every milestone.
        warmup_fraction: part of the run spent going up, for ``cosine`` and ``one_cycle``.
        milestones: fractions of the run, for ``step``.
        decay: factor at each milestone, for ``step``.

    Raises:
        ValueError: `name` is none of these.

    """
    if name == "constant":
        return lambda progress: 1.0
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
