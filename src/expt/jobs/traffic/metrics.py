"""MAE, RMSE and MAPE over observed readings, as sums over a whole split.

A mean of per-batch means would flatter: batches with few observed readings count too much.

Letters: `B` batch, `P` horizon, `N` sensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from expt.errors import ModelError
from expt.job import Batch, Metric

REPORTED_MINUTES = (15, 30, 60)
MOST_PERIODS = 60
"""Into which a part of the series is divided, to tell its errors apart."""


def day_periods(first_forecasts: np.ndarray) -> tuple[list[int], int]:
    """Return which windows are the first of a period of whole days, and how many days it has.

    A window belongs to the day of its first forecast, whose times [W] these are, in order. Up to
    `MOST_PERIODS` days are told apart; of more, as few as possible are joined.
    """
    days, day = np.unique(first_forecasts.astype("datetime64[D]"), return_inverse=True)
    joined = max(-(-len(days) // MOST_PERIODS), 1)
    return [0, *(np.flatnonzero(np.diff(day // joined)) + 1).tolist()], joined


def reported_steps(horizon: int, step_seconds: int) -> dict[str, int]:
    """Return the steps, from 1, whose errors are reported, in order, under their minutes ahead.

    These are 15, 30 and 60 minutes; where the series has no step at one of them, also a quarter,
    a half and the whole of the horizon, rounded up to a step.
    """
    seconds = [60 * minutes for minutes in REPORTED_MINUTES]
    steps = {
        ahead // step_seconds
        for ahead in seconds
        if ahead % step_seconds == 0 and ahead <= horizon * step_seconds
    }
    if len(steps) < len(seconds):
        steps |= {-(-horizon * quarters // 4) for quarters in (1, 2, 4)}
    return {f"{step * step_seconds / 60:g}": step for step in sorted(steps)}


def error_metrics(horizon: int, step_seconds: int, unit: str) -> list[Metric]:
    """Return what `MaskedErrors` computes, the monitored figure first.

    The errors at `REPORTED_MINUTES` are always among them, whether the series has such a step or
    not, so that records of all series have the same keys.
    """
    minutes = {f"{m:g}" for m in REPORTED_MINUTES} | set(reported_steps(horizon, step_seconds))
    return [
        Metric("mae", label="MAE", unit=unit),
        *(
            Metric(f"mae_{ahead}min", label=f"MAE, {ahead} min", unit=unit)
            for ahead in sorted(minutes, key=float)
        ),
        Metric("rmse", label="RMSE", unit=unit),
        Metric("mape", label="MAPE", percent=True, digits=4),
    ]


def check_shape(prediction: Tensor, batch: Batch) -> None:
    """Raise ModelError unless the prediction has the target's shape; broadcasting would hide it."""
    if prediction.shape != batch.target.shape:
        raise ModelError(
            f"the model returned {list(prediction.shape)}, expected {list(batch.target.shape)} "
            "[batch, horizon, sensors]"
        )


class MaskedErrors:
    """Errors per forecast step, and per sensor and time; implements `expt.job.Accumulator`.

    Args:
        to_speed: undoes the scaling of a prediction, into the target's unit.
        horizon: steps P.
        step_seconds: between two steps.
        begins: which windows are the first of a period, as they come, from 0; errors per sensor
            are added up over each.

    """

    def __init__(
        self,
        to_speed: Callable[[Tensor], Tensor],
        horizon: int,
        step_seconds: int,
        begins: Sequence[int] = (0,),
    ) -> None:
        self.to_speed = to_speed
        self.horizon = horizon
        self.step_seconds = step_seconds
        self.begins = begins
        self.sums: Tensor | None = None  # [4, P] float64: |e|, e^2, |e|/truth, observed
        self._periods: list[Tensor] = []  # of each [3, N]: |e|, e, observed
        self._windows = 0

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add predictions [B,P,N] (normalised) for targets [B,P,N], 0 = missing."""
        check_shape(prediction, batch)
        start = 0
        while start < len(batch.target):
            period = bisect_right(self.begins, self._windows)
            end = len(batch.target)
            if period < len(self.begins):
                end = min(end, start + self.begins[period] - self._windows)
            self._add(prediction[start:end], batch.target[start:end], period)
            start = end

    def _add(self, prediction: Tensor, target: Tensor, period: int) -> None:
        """Add windows of one period, counted from 1."""
        observed = target > 0
        error = torch.where(observed, self.to_speed(prediction) - target, 0.0)
        relative = error.abs() / torch.where(observed, target, 1.0)
        parts = (error.abs(), error.square(), relative, observed, error)
        # MPS has no float64; the per-batch sums there are exact enough in float32.
        dtype = torch.float32 if error.device.type == "mps" else torch.float64
        sums = torch.stack([part.sum(dim=0, dtype=dtype) for part in parts])  # [5, P, N]
        by_step, by_sensor = sums[:4].sum(dim=2), sums.sum(dim=1)
        of_period = torch.stack((by_sensor[0], by_sensor[4], by_sensor[3]))
        self.sums = by_step if self.sums is None else self.sums + by_step
        if period > len(self._periods):
            self._periods.append(of_period)
        else:
            self._periods[-1] += of_period
        self._windows += len(target)

    def compute(self) -> dict[str, float]:
        """Return ``mae``, ``rmse``, ``mape`` (a fraction), and ``mae_15min`` and other steps.

        Which steps those are is said by `reported_steps`.
        """
        if self.sums is None:
            raise ValueError("no batch was added")
        absolute, squared, relative, observed = self.sums.cpu().double()
        count = observed.sum()
        figures = {
            "mae": float(absolute.sum() / count),
            "rmse": float((squared.sum() / count).sqrt()),
            "mape": float(relative.sum() / count),
        }
        for minutes, step in reported_steps(self.horizon, self.step_seconds).items():
            figures[f"mae_{minutes}min"] = float(absolute[step - 1] / observed[step - 1])
        return figures

    def by_step(self) -> list[float]:
        """Return the MAE of every forecast step, length P."""
        if self.sums is None:
            raise ValueError("no batch was added")
        absolute, _, _, observed = self.sums.cpu().double()
        return [float(value) for value in absolute / observed]

    def by_sensor(self) -> Tensor:
        """Return sums [periods, 3, N] of |error|, of error (forecast - truth), and of readings.

        Which windows are in a period is said by `begins`.
        """
        if not self._periods:
            raise ValueError("no batch was added")
        return torch.stack(self._periods).cpu().double()
