"""`historical_average`: each sensor's mean at this minute of the week, over the training part.

The averages are buffers, filled by a training epoch like the running statistics of a batch
normalisation: the last reading of every window is counted, so that one epoch counts each reading of
the training part once (all but those of the first window's other steps), and further epochs change
nothing. As in `persistence`, the one weight has no elements. `trainer.epochs=1` is enough.

Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon, `W` steps of a week.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expt.jobs.traffic.embedding import DAYS_PER_WEEK


class HistoricalAverage(nn.Module):
    """Forecast [B, P, N] (normalised speed).

    Where a sensor has no reading at a minute of the week, its mean over all of them is forecast;
    where it has none at all, the mean of all sensors, which is 0.

    Args:
        num_sensors: sensors N, from the data.
        horizon: steps P to forecast, from the data.
        steps_per_day: a seventh of W, from the data.

    """

    sums: Tensor
    counts: Tensor

    def __init__(self, num_sensors: int, horizon: int, steps_per_day: int) -> None:
        super().__init__()
        self.horizon, self.steps_per_day = horizon, steps_per_day
        week = DAYS_PER_WEEK * steps_per_day
        self.register_buffer("sums", torch.zeros(week, num_sensors))
        self.register_buffer("counts", torch.zeros(week, num_sensors))
        self.nothing = nn.Parameter(torch.empty(0))  # what the optimizer is given

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, day_of_week: Tensor
    ) -> Tensor:
        """Forecast from speed [B,T,N], observed [B,T,N] bool, time [B,T], day [B,T] (int64)."""
        now = day_of_week[:, -1] * self.steps_per_day + time_of_day[:, -1]  # [B], step of the week
        if self.training:
            seen = observed[:, -1].to(self.counts.dtype)
            self.sums.index_add_(0, now, speed[:, -1].to(self.sums.dtype) * seen)
            self.counts.index_add_(0, now, seen)
        ahead = torch.arange(1, self.horizon + 1, device=now.device)
        steps = (now.unsqueeze(1) + ahead) % len(self.sums)  # [B, P]
        return self._averages()[steps] + self.nothing.sum()

    def _averages(self) -> Tensor:
        """Return what is known of every step of the week, [W, N]."""
        overall = self.sums.sum(dim=0) / self.counts.sum(dim=0).clamp(min=1)  # [N]
        return torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), overall)
