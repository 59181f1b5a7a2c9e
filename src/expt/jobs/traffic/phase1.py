"""`phase1`: the traffic guide's fallback; two fixed stages, one scale, no cross-stage attention.

The first stage encodes each sensor over time and folds the window into one token; the second
lets these tokens attend to each other over the sensors. Attention over sensors thus runs once
per window instead of once per step, which makes this the smallest of the attention models: the
last rung of the emergency ladder lite -> minimal -> phase1.

Letters: `B` batch, `T` input steps, `N` sensors, `D` width, `P` horizon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from expt.errors import ConfigError
from expt.jobs.attention import EncoderLayer
from expt.jobs.traffic.alternating import Alternating
from expt.jobs.traffic.embedding import WindowEmbedding


class Phase1(nn.Module):
    """Forecast [B, P, N] (normalised speed); arguments and errors as in `Alternating`."""

    def __init__(
        self,
        num_sensors: int,
        input_steps: int,
        horizon: int,
        steps_per_day: int,
        embed_dim: int,
        num_heads: int,
        ffn_ratio: int,
        dropout: float,
    ) -> None:
        super().__init__()
        problems = self.problems({key: value for key, value in locals().items() if key != "self"})
        if problems:
            raise ConfigError(problems)
        self.embedding = WindowEmbedding(num_sensors, input_steps, steps_per_day, embed_dim)
        self.temporal = EncoderLayer(embed_dim, num_heads, ffn_ratio, dropout)
        self.fold = nn.Linear(input_steps * embed_dim, embed_dim)
        self.spatial = EncoderLayer(embed_dim, num_heads, ffn_ratio, dropout)
        self.head = nn.Linear(embed_dim, horizon)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge what is known of the arguments; see `expt.job.Checked`."""
        return Alternating.problems(arguments)

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, day_of_week: Tensor
    ) -> Tensor:
        """Forecast from speed [B,T,N], observed [B,T,N] bool, time [B,T], day [B,T] (int64)."""
        tokens = self.embedding(speed, observed, time_of_day, day_of_week).transpose(1, 2)
        folded = self.fold(self.temporal(tokens).flatten(2))  # [B, N, D]
        return self.head(self.spatial(folded)).transpose(1, 2)  # type: ignore[no-any-return]
