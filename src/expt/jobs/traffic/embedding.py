"""Token embedding of a traffic window: what was measured, when, and where.

Source of the recipe: STAEformer (Liu et al., CIKM 2023, arXiv:2308.10425), whose learned table
per window position and sensor is its largest single gain; here the parts are summed, not
concatenated, so that the width stays the width. A missing reading enters as the mean with a
flag of its own, instead of as a speed of zero.

Letters: `B` batch, `T` input steps, `N` sensors, `D` width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DAYS_PER_WEEK = 7
READING_FEATURES = 2  # the normalised speed and whether it was observed


PLAIN_FEATURES = 3  # speed, time of day and day of week as fractions


def plain_features(
    speed: Tensor,
    observed: Tensor,
    time_of_day: Tensor,
    day_of_week: Tensor,
    steps_per_day: int,
    missing_value: float,
) -> Tensor:
    """Return the inputs of published models, [B, T, N, 3]: a missing reading is the zero it is.

    From speed [B,T,N], observed [B,T,N] bool, time and day [B,T] int64; `missing_value` is that
    zero, normalised.
    """
    readings = torch.where(observed, speed, missing_value)
    when = torch.stack((time_of_day / steps_per_day, day_of_week / DAYS_PER_WEEK), dim=-1)
    spread = when.to(speed.dtype).unsqueeze(2).expand(-1, -1, speed.shape[2], -1)
    return torch.cat((readings.unsqueeze(-1), spread), dim=-1)


class WindowEmbedding(nn.Module):
    """Sum of reading, time of day, day of week and a learned table [T, N, D].

    `forward(speed [B,T,N], observed [B,T,N], time_of_day [B,T], day_of_week [B,T])` -> [B,T,N,D].
    """

    def __init__(
        self, num_sensors: int, input_steps: int, steps_per_day: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.reading = nn.Linear(READING_FEATURES, embed_dim)
        self.time_of_day = nn.Embedding(steps_per_day, embed_dim)
        self.day_of_week = nn.Embedding(DAYS_PER_WEEK, embed_dim)
        self.place = nn.Parameter(torch.empty(input_steps, num_sensors, embed_dim))
        for table in (self.time_of_day.weight, self.day_of_week.weight, self.place):
            nn.init.normal_(table, std=0.1)

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, day_of_week: Tensor
    ) -> Tensor:
        """Return the embedded window [B, T, N, D]."""
        reading = self.reading(torch.stack((speed, observed.to(speed.dtype)), dim=-1))
        when = self.time_of_day(time_of_day) + self.day_of_week(day_of_week)  # [B, T, D]
        embedded: Tensor = reading + when.unsqueeze(2) + self.place
        return embedded
