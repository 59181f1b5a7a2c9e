"""MAE, RMSE and MAPE over observed readings, as sums over a whole split.

A mean of per-batch means would flatter: batches with few observed readings count too much.

Letters: `B` batch, `P` horizon, `N` sensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expt.errors import ModelError
from expt.job import Batch, Metric

REPORTED_MINUTES = (15, 30, 60)


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
    """Errors per forecast step, in the target's unit; implements `expt.job.Accumulator`."""

    def __init__(
        self, to_speed: Callable[[Tensor], Tensor], horizon: int, step_seconds: int
    ) -> None:
        self.to_speed = to_speed
        self.horizon = horizon
        self.step_seconds = step_seconds
        self.sums: Tensor | None = None  # [4, P] float64: |e|, e^2, |e|/truth, observed

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add predictions [B,P,N] (normalised) for targets [B,P,N], 0 = missing."""
        check_shape(prediction, batch)
        observed = batch.target > 0
        error = torch.where(observed, self.to_speed(prediction) - batch.target, 0.0)
        relative = error.abs() / torch.where(observed, batch.target, 1.0)
        parts = (error.abs(), error.square(), relative, observed)
        # MPS has no float64; the per-batch sums there are exact enough in float32.
        dtype = torch.float32 if error.device.type == "mps" else torch.float64
        sums = torch.stack([part.sum(dim=(0, 2), dtype=dtype) for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums

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
