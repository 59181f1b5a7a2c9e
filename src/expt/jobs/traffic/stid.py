"""`stid`: Spatial-Temporal IDentity, the small MLP that is hard to beat; our honest baseline.

Written from Shao et al., "Spatial-Temporal Identity: A Simple yet Effective Baseline for
Multivariate Time Series Forecasting", CIKM 2022 (arXiv:2208.05233): every sensor's window is
embedded by one linear layer, joined with learned vectors for the sensor, the time of day and
the day of week of the last input step, and passed through residual MLP layers. As in the
paper, missing readings enter as the zeros they are stored as, normalised.

Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon, `W` width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError, share_problems
from expt.jobs.traffic.embedding import DAYS_PER_WEEK, PLAIN_FEATURES, plain_features


class STID(nn.Module):
    """Forecast [B, P, N] (normalised speed).

    Args:
        num_sensors: sensors N, from the data.
        input_steps: steps T in the window, from the data.
        horizon: steps P to forecast, from the data.
        steps_per_day: entries of the time-of-day table, from the data.
        missing_value: what a missing reading is after normalisation, from the data.
        embed_dim: width of each of the four parts; W is four times that.
        num_layers: residual MLP layers.
        dropout: inside each MLP layer.

    Raises:
        ConfigError: with every impossible value among the last three.

    """

    def __init__(
        self,
        num_sensors: int,
        input_steps: int,
        horizon: int,
        steps_per_day: int,
        missing_value: float,
        embed_dim: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        problems = self.problems(
            {"embed_dim": embed_dim, "num_layers": num_layers, "dropout": dropout}
        )
        if problems:
            raise ConfigError(problems)
        self.steps_per_day = steps_per_day
        self.missing_value = missing_value
        self.window = nn.Linear(input_steps * PLAIN_FEATURES, embed_dim)
        self.sensor = nn.Parameter(torch.empty(num_sensors, embed_dim))
        self.time_of_day = nn.Parameter(torch.empty(steps_per_day, embed_dim))
        self.day_of_week = nn.Parameter(torch.empty(DAYS_PER_WEEK, embed_dim))
        for table in (self.sensor, self.time_of_day, self.day_of_week):
            nn.init.xavier_uniform_(table)
        width = 4 * embed_dim
        self.layers = nn.ModuleList(_residual_branch(width, dropout) for _ in range(num_layers))
        self.head = nn.Linear(width, horizon)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge what is known of the arguments; see `expt.job.Checked`."""
        found = [
            f"model.{name} must be at least {least}, got {arguments[name]}"
            for name, least in (("embed_dim", 1), ("num_layers", 0))
            if arguments.get(name, least) < least
        ]
        return found + share_problems("model.dropout", arguments.get("dropout", 0.0))

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, day_of_week: Tensor
    ) -> Tensor:
        """Forecast from speed [B,T,N], observed [B,T,N] bool, time [B,T], day [B,T] (int64)."""
        batch, _, sensors = speed.shape
        features = plain_features(
            speed, observed, time_of_day, day_of_week, self.steps_per_day, self.missing_value
        )  # [B, T, N, 3]
        parts = (
            self.window(features.transpose(1, 2).flatten(2)),
            self.sensor.expand(batch, -1, -1),
            self.time_of_day[time_of_day[:, -1]].unsqueeze(1).expand(-1, sensors, -1),
            self.day_of_week[day_of_week[:, -1]].unsqueeze(1).expand(-1, sensors, -1),
        )
        hidden = torch.cat(parts, dim=-1)  # [B, N, W]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden).transpose(1, 2)  # type: ignore[no-any-return]


def _residual_branch(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
    )
