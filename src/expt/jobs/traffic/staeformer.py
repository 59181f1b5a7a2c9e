"""`staeformer`: plain transformer layers on an embedding that knows place and time.

Written from Liu et al., "Spatio-Temporal Adaptive Embedding Makes Vanilla Transformer SOTA for
Traffic Forecasting", CIKM 2023 (arXiv:2308.10425): a reading's embedding, those of its time of
day and day of week, and a learned vector per window step and sensor are put side by side; layers
over time per sensor come first, then layers over sensors per step; one linear layer maps a
sensor's whole window to its forecast. As published, missing readings enter as zeros, normalised.

`conf/model/staeformer.yaml` has the sizes for METR-LA, and the published number of parameters:
1,258,980 with 207 sensors.

Letters: `B` batch, `T` input steps, `N` sensors, `D` width, `P` horizon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError, share_problems
from expt.jobs.attention import EncoderLayer
from expt.jobs.traffic.embedding import DAYS_PER_WEEK, PLAIN_FEATURES, plain_features

WIDTHS = ("input_embed_dim", "time_embed_dim", "day_embed_dim", "adaptive_embed_dim")
"""The parts of D."""


class STAEformer(nn.Module):
    """Forecast [B, P, N] (normalised speed).

    Args:
        num_sensors: sensors N, from the data.
        input_steps: steps T in the window, from the data.
        horizon: steps P to forecast, from the data.
        steps_per_day: entries of the time-of-day table, from the data.
        missing_value: what a missing reading is after normalisation, from the data.
        input_embed_dim: width of a reading's embedding.
        time_embed_dim: width of the time of day's.
        day_embed_dim: width of the day of week's.
        adaptive_embed_dim: width of the learned table [T, N]; D is the sum of the four, divisible
            by `num_heads`.
        feed_forward_dim: width inside a layer's feed-forward part.
        num_heads: attention heads.
        num_layers: layers over time, and as many over sensors.
        dropout: on every residual branch.

    Raises:
        ConfigError: with every impossible value among the last eight.

    """

    def __init__(
        self,
        num_sensors: int,
        input_steps: int,
        horizon: int,
        steps_per_day: int,
        missing_value: float,
        input_embed_dim: int,
        time_embed_dim: int,
        day_embed_dim: int,
        adaptive_embed_dim: int,
        feed_forward_dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        problems = self.problems({key: value for key, value in locals().items() if key != "self"})
        if problems:
            raise ConfigError(problems)
        self.steps_per_day, self.missing_value = steps_per_day, missing_value
        self.reading = nn.Linear(PLAIN_FEATURES, input_embed_dim)
        self.time_of_day = nn.Embedding(steps_per_day, time_embed_dim)
        self.day_of_week = nn.Embedding(DAYS_PER_WEEK, day_embed_dim)
        self.adaptive = nn.Parameter(torch.empty(input_steps, num_sensors, adaptive_embed_dim))
        nn.init.xavier_uniform_(self.adaptive)
        width = input_embed_dim + time_embed_dim + day_embed_dim + adaptive_embed_dim
        self.temporal, self.spatial = (
            nn.ModuleList(
                EncoderLayer(width, num_heads, feed_forward_dim / width, dropout)
                for _ in range(num_layers)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(input_steps * width, horizon)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge what is known of the arguments; see `expt.job.Checked`."""
        sizes = (*WIDTHS, "feed_forward_dim", "num_heads", "num_layers")
        found = [
            f"model.{name} must be at least 1, got {arguments[name]}"
            for name in sizes
            if arguments.get(name, 1) < 1
        ]
        if not found and all(name in arguments for name in (*WIDTHS, "num_heads")):
            width, heads = sum(arguments[name] for name in WIDTHS), arguments["num_heads"]
            if width % heads:
                found.append(
                    f"the width {width}, which is model.{' + model.'.join(WIDTHS)}, is not "
                    f"divisible by model.num_heads={heads}"
                )
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
            self.reading(features),
            self.time_of_day(time_of_day).unsqueeze(2).expand(-1, -1, sensors, -1),
            self.day_of_week(day_of_week).unsqueeze(2).expand(-1, -1, sensors, -1),
            self.adaptive.expand(batch, -1, -1, -1),
        )
        tokens = torch.cat(parts, dim=-1).transpose(1, 2)  # [B, N, T, D]
        for layer in self.temporal:
            tokens = layer(tokens)
        tokens = tokens.transpose(1, 2)  # [B, T, N, D]
        for layer in self.spatial:
            tokens = layer(tokens)
        window = tokens.transpose(1, 2).flatten(2)  # [B, N, T*D]
        return self.head(window).transpose(1, 2)  # type: ignore[no-any-return]
