"""How likely memory is to run out soon, and what to do before it does.

A straight line through the last readings is continued; what its own uncertainty and the scatter
about it leave above the capacity is the risk (prediction interval of simple linear regression,
e.g. N. R. Draper and H. Smith, Applied Regression Analysis, 3rd ed., section 1.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from expt.memory.diagnosis.significance import upper_tail
from expt.memory.diagnosis.trend import Reading

Action = Literal["halve_batch_and_checkpoint", "smaller_batch", "mixed_precision", "none"]

WINDOW = 50
"""Readings that the line is put through."""
FEWEST = 4
"""Readings below which there is no line worth continuing."""
ACTIONS: tuple[tuple[float, Action, str], ...] = (
    (
        0.8,
        "halve_batch_and_checkpoint",
        "halve the micro-batch (double memory.gradient_accumulation) and set "
        "memory.activation_checkpointing=true",
    ),
    (0.5, "smaller_batch", "use three quarters of the batch: data.batch_size x 0.75"),
    (0.3, "mixed_precision", "set memory.precision=bf16"),
    (0.0, "none", "nothing"),
)
"""Risk above which to act, from the highest, and how (the handbook's table)."""


@dataclass(frozen=True)
class Forecast:
    """Where the bytes after a step are heading."""

    risk: float  # probability, 0 to 1, of passing the capacity within the horizon
    horizon_steps: float
    expected_bytes: int  # after those steps
    steps_left: float | None  # until the line meets the capacity; None if it does not rise
    action: Action
    advice: str


def forecast(
    readings: Sequence[Reading],
    capacity_bytes: int,
    horizon_steps: float = 100,
    window: int = WINDOW,
) -> Forecast | None:
    """Continue the line through the last readings; None for fewer than `FEWEST` of them.

    Args:
        readings: in the order of their steps. Where they have peaks, what a step needs on top of
            what is left after it is taken off the capacity.
        capacity_bytes: what the device or the budget has.
        horizon_steps: how far to look ahead.
        window: readings that count.

    """
    last = list(readings)[-window:]
    if len(last) < FEWEST:
        return None
    x = np.array([reading.step for reading in last], dtype=float)
    y = np.array([reading.allocated_bytes for reading in last], dtype=float)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * y).sum()) / spread if spread else 0.0
    at = float(x[-1]) + horizon_steps
    expected = float(y.mean()) + slope * (at - float(x.mean()))
    rest = y - y.mean() - slope * (x - x.mean())
    n = len(last)
    # Figures are rounded and allocators jitter: no line is better known than to a thousandth.
    error = max(float((rest**2).sum()) / (n - 2), (1e-3 * float(y.mean())) ** 2, 1.0)
    distance = (at - float(x.mean())) ** 2 / spread if spread else 0.0
    deviation = sqrt(error * (1 + 1 / n + distance))
    room = capacity_bytes - _transient(last)
    risk = upper_tail((room - expected) / deviation, n - 2)
    left = max((room - float(y[-1])) / slope, 0.0) if slope > 0 else None
    _, action, advice = next(row for row in ACTIONS if risk > row[0] or row[0] == 0.0)
    return Forecast(risk, horizon_steps, round(expected), left, action, advice)


def _transient(readings: Sequence[Reading]) -> int:
    """Return the bytes that a step needs for a while, above the most that was left after one."""
    peaks = [reading.peak_bytes for reading in readings if reading.peak_bytes is not None]
    if not peaks:
        return 0
    return max(max(peaks) - max(reading.allocated_bytes for reading in readings), 0)
