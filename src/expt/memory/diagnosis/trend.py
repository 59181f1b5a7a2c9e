"""What a series of memory readings says: a leak, fragmentation, another process, or nothing.

A leak is growth of the bytes still allocated when a step is over: what a step needs in between is
gone by then, so these bytes should stay as they are once training has warmed up. Growth counts
when it is significant (see `statistics`), goes on in the second half of the readings, and is not
negligible; a step up followed by a plateau is none.

`forecast` continues a straight line through the last readings; what its own uncertainty and the
scatter about it leave above the capacity is the risk (prediction interval of simple linear
regression, e.g. N. R. Draper and H. Smith, Applied Regression Analysis, 3rd ed., section 1.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from expt.memory.diagnosis.statistics import (
    EXACT_UP_TO,
    Array,
    parabola,
    rising_probability,
    sen_slope,
)
from expt.units import MIB, counted, format_bytes

Verdict = Literal["leak", "fragmentation", "other_process", "steady"]
Action = Literal["halve_batch_and_checkpoint", "smaller_batch", "mixed_precision", "none"]

SIGNIFICANCE = 1e-4
"""Largest p value of a rise."""
SIGNIFICANCE_OF_FEW = {4: 0.042, 5: 0.0084, 6: 0.0014, 7: 0.0002}
"""The same for so few readings: a rise at every one of them."""
SMALLEST_RISE = 0.04
"""Smallest rise over all readings that is reported, as a part of the level."""
SMALLEST_RISE_OF_FEW = 0.25
"""The same with up to 7 readings, which luck could have put in order; 0.1 if memory did run out,
and with up to 10 readings."""
STILL_RISING = 0.25
"""Slope of the second half, as a part of the whole slope, below which growth has ended."""
FRAGMENTED = 0.2
"""Part of the reserved bytes without a tensor in it (handbook: tidy from 20 to 30 % on)."""
MOST_READINGS = 300
"""A longer series is put together to so many medians: the tests look at all pairs."""
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
class Reading:
    """Bytes on a device when a step was over; None is what nobody measured.

    `high_water` says that `allocated_bytes` is a peak since the start, which never falls.
    """

    step: float
    allocated_bytes: int
    reserved_bytes: int | None = None
    other_bytes: int | None = None  # of other processes
    peak_bytes: int | None = None
    total_bytes: int | None = None
    high_water: bool = False


@dataclass(frozen=True)
class Trend:
    """A verdict and the figures behind it, of the quantity that it is about."""

    verdict: Verdict
    accelerating: bool
    readings: int
    first_step: float
    last_step: float
    growth_bytes: int  # from the first step to the last, along the median slope
    growth_bytes_per_step: float
    p_value: float
    evidence: tuple[str, ...]


def judge(readings: Sequence[Reading], ran_out: bool = False) -> Trend:
    """Return the verdict over readings in the order of their steps.

    Args:
        readings: fewer than 4 say nothing, fewer than 2 if `ran_out`.
        ran_out: the series ends because memory did; a short rise then counts for more.

    """
    if not readings:
        return Trend("steady", False, 0, 0.0, 0.0, 0, 0.0, 1.0, ("There are no readings.",))
    steps = np.array([reading.step for reading in readings])
    allocated = np.array([float(reading.allocated_bytes) for reading in readings])
    high_water = any(reading.high_water for reading in readings)
    leak = _Rise(steps, allocated, high_water=high_water, ran_out=ran_out)
    reserved = _column(readings, "reserved_bytes")
    other = _column(readings, "other_bytes")
    if leak.is_real:
        return _trend("leak", leak, readings, "The memory allocated after a step")
    if reserved is not None:
        unused = _Rise(steps, reserved - allocated, scale=float(np.median(reserved)))
        fraction = float(np.median((1 - allocated / np.maximum(reserved, 1))[-_tail(len(steps)) :]))
        if unused.is_real and fraction > FRAGMENTED:
            why = f"At the end {fraction:.0%} of what is reserved holds no tensor."
            return _trend(
                "fragmentation", unused, readings, "The memory reserved but unallocated", why
            )
    if other is not None:
        theirs = _Rise(steps, other, scale=float(np.median(allocated) + np.median(other)))
        if theirs.is_real or theirs.has_stepped_up:
            return _trend("other_process", theirs, readings, "The memory held by other processes")
    return _trend("steady", leak, readings, "The memory allocated after a step")


class _Rise:
    """One quantity over the steps, and whether it rises."""

    def __init__(
        self,
        steps: Array,
        values: Array,
        scale: float | None = None,
        high_water: bool = False,
        ran_out: bool = False,
    ) -> None:
        self.steps, self.values = _thinned(steps, values)
        self.slope = sen_slope(self.steps, self.values)
        self.p_value = rising_probability(self.steps, self.values)
        self.growth = self.slope * float(self.steps[-1] - self.steps[0])
        self._scale = max(scale or float(np.median(np.abs(self.values[: _tail(len(values))]))), 1.0)
        self._high_water = high_water
        self._ran_out = ran_out

    @property
    def is_real(self) -> bool:
        """Significant, large enough to matter, and still going on."""
        n = len(self.values)
        if self._ran_out and 2 <= n <= 3:
            return bool(np.all(np.diff(self.values) > 0)) and self.growth >= 0.1 * self._scale
        few = n in SIGNIFICANCE_OF_FEW and not self._ran_out
        smallest = SMALLEST_RISE if n > EXACT_UP_TO else SMALLEST_RISE_OF_FEW if few else 0.1
        if n < 4 or self.growth < smallest * self._scale:
            return False
        return self.p_value <= SIGNIFICANCE_OF_FEW.get(n, SIGNIFICANCE) and self._goes_on()

    @property
    def accelerating(self) -> bool:
        """Whether the slope itself rises, significantly and by at least a quarter."""
        n = len(self.values)
        if n <= 7:
            rates = np.diff(self.values) / np.diff(self.steps)
            return n >= 3 and bool(np.all(np.diff(rates) > 0)) and bool(rates[-1] > 1.5 * rates[0])
        from scipy.stats import t

        early, late = slice(0, n // 2 + 1), slice(n // 2, n)
        before = sen_slope(self.steps[early], self.values[early])
        after = sen_slope(self.steps[late], self.values[late])
        bend, _ = parabola(self.steps, self.values)
        return after > 1.25 * max(before, 0.0) and bool(t.sf(bend, n - 3) < 0.01)

    @property
    def has_stepped_up(self) -> bool:
        """Whether it stands far higher at the end than at the beginning, by whatever path."""
        tail = _tail(len(self.values))
        begin, end = self.values[:tail], self.values[-tail:]
        up = float(np.median(end) - np.median(begin))
        noise = max(float(np.ptp(begin)), float(np.ptp(end)))
        return tail >= 3 and up > max(0.05 * self._scale, 2 * noise, 64 * MIB)

    def _goes_on(self) -> bool:
        half = len(self.values) // 2
        steps, values = self.steps[half:], self.values[half:]
        if sen_slope(steps, values) < STILL_RISING * self.slope:
            return False
        if self._high_water:
            # The highest so far of mere noise rises too, but ever more seldom.
            return float(np.mean(np.diff(values) > 0)) >= 0.5
        return len(values) < 5 or rising_probability(steps, values) < 0.05


def _trend(
    verdict: Verdict, rise: _Rise, readings: Sequence[Reading], name: str, *more: str
) -> Trend:
    first, last = readings[0].step, readings[-1].step
    begin, end = (format_bytes(round(float(rise.values[at]))) for at in (0, -1))
    accelerating = verdict == "leak" and rise.accelerating
    rate = (
        f"{name} was {begin} at step {first:g} and {end} at step {last:g}: "
        f"{rise.slope / MIB:+.3g} MiB a step over {counted(len(readings), 'reading')}."
    )
    test = f"The rank test for a rise gives p = {rise.p_value:.2g}" + (
        "; the slope itself rises." if accelerating else "."
    )
    return Trend(
        verdict,
        accelerating,
        len(readings),
        first,
        last,
        round(rise.growth),
        rise.slope,
        rise.p_value,
        (rate, test, *more),
    )


def _column(readings: Sequence[Reading], name: str) -> Array | None:
    """Return a quantity of all readings as [n], or None if one of them lacks it."""
    values = [getattr(reading, name) for reading in readings]
    if any(value is None for value in values):
        return None
    return np.array([float(value) for value in values])


def _tail(count: int) -> int:
    """Return the size of the first or last third."""
    return max(count // 3, 1)


def _thinned(steps: Array, values: Array) -> tuple[Array, Array]:
    """Return at most `MOST_READINGS` medians of neighbours."""
    if len(steps) <= MOST_READINGS:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), MOST_READINGS)
    medians = np.array([(np.median(steps[g]), np.median(values[g])) for g in groups])
    return medians[:, 0], medians[:, 1]


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
        capacity_bytes: what the device or the budget has; what others hold now is taken off.
        horizon_steps: how far to look ahead.
        window: readings that count.

    """
    last = list(readings)[-window:]
    if len(last) < FEWEST:
        return None
    from scipy.stats import t

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
    room = capacity_bytes - (last[-1].other_bytes or 0) - _transient(last)
    risk = float(t.sf((room - expected) / deviation, n - 2))
    left = max((room - float(y[-1])) / slope, 0.0) if slope > 0 else None
    _, action, advice = next(row for row in ACTIONS if risk > row[0] or row[0] == 0.0)
    return Forecast(risk, horizon_steps, round(expected), left, action, advice)


def _transient(readings: Sequence[Reading]) -> int:
    """Return the bytes that a step needs for a while, above the most that was left after one."""
    peaks = [reading.peak_bytes for reading in readings if reading.peak_bytes is not None]
    if not peaks:
        return 0
    return max(max(peaks) - max(reading.allocated_bytes for reading in readings), 0)
