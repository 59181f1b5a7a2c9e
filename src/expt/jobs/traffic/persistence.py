"""`persistence`: the last reading, repeated; what every forecaster must beat.

A missing reading is repeated as the zero that it is stored as. There is nothing to train: the one
weight has no elements, so that a run plans, tests and records it like any other model, with 0
parameters. `trainer.epochs=1` is enough.

Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Persistence(nn.Module):
    """Forecast [B, P, N] (normalised speed).

    Args:
        horizon: steps P to forecast, from the data.
        missing_value: what a missing reading is after normalisation, from the data.

    """

    def __init__(self, horizon: int, missing_value: float) -> None:
        super().__init__()
        self.horizon, self.missing_value = horizon, missing_value
        self.nothing = nn.Parameter(torch.empty(0))  # what the optimizer is given

    def forward(self, speed: Tensor, observed: Tensor, **others: Tensor) -> Tensor:
        """Forecast from speed [B,T,N] and observed [B,T,N] bool."""
        last = torch.where(observed[:, -1:], speed[:, -1:], self.missing_value)  # [B, 1, N]
        return last.repeat(1, self.horizon, 1) + self.nothing.sum()
