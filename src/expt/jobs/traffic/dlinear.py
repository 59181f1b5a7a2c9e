"""`dlinear`: two linear layers over the window, one for its trend and one for the rest.

Written from Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023
(arXiv:2205.13504), Section 4: a moving average is the trend, what it leaves the seasonal part;
each is mapped from T to P steps by a layer that all sensors share, and the two are summed. It knows
neither the time nor other sensors. Missing readings enter as zeros, normalised.

The paper's Table 8 gives 139.7 K parameters for 96 steps in and 720 out, which are those here; with
the 12 and 12 of METR-LA there are 312.

Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.errors import ConfigError


class DLinear(nn.Module):
    """Forecast [B, P, N] (normalised speed).

    Args:
        input_steps: steps T in the window, from the data.
        horizon: steps P to forecast, from the data.
        missing_value: what a missing reading is after normalisation, from the data.
        moving_average: steps that the trend is averaged over, an odd number; beyond the window its
            first and last readings are repeated.

    Raises:
        ConfigError: `moving_average` is impossible.

    """

    def __init__(
        self, input_steps: int, horizon: int, missing_value: float, moving_average: int
    ) -> None:
        super().__init__()
        problems = self.problems({"moving_average": moving_average})
        if problems:
            raise ConfigError(problems)
        self.missing_value, self.moving_average = missing_value, moving_average
        self.trend = nn.Linear(input_steps, horizon)
        self.seasonal = nn.Linear(input_steps, horizon)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge what is known of the arguments; see `expt.job.Checked`."""
        steps = arguments.get("moving_average", 1)
        if steps >= 1 and steps % 2:
            return []
        return [f"model.moving_average must be an odd number of steps, got {steps}"]

    def forward(self, speed: Tensor, observed: Tensor, **others: Tensor) -> Tensor:
        """Forecast from speed [B,T,N] and observed [B,T,N] bool."""
        readings = torch.where(observed, speed, self.missing_value).transpose(1, 2)  # [B, N, T]
        beyond = self.moving_average // 2
        padded = F.pad(readings, (beyond, beyond), mode="replicate")
        trend = F.avg_pool1d(padded, self.moving_average, stride=1)
        forecast = self.trend(trend) + self.seasonal(readings - trend)  # [B, N, P]
        return forecast.transpose(1, 2)  # type: ignore[no-any-return]
