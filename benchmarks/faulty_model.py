"""A small model that goes wrong as it is told to, in training only and not when it is planned."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

NAN, OUT_OF_MEMORY, HANG, CRASH, DIE = 1, 2, 3, 4, 5
"""Values of `fault`; every other one is none."""
HOARD_BYTES = 2**30


class Faulty(nn.Module):
    """Two layers over time, for every sensor alike.

    Args:
        input_steps: of the data.
        horizon: of the data.
        width: of the hidden layer.
        fault: what goes wrong in the forward pass.

    """

    def __init__(self, input_steps: int, horizon: int, width: int = 8, fault: int = 0) -> None:
        super().__init__()
        self.fault = fault
        self.layers = nn.Sequential(
            nn.Linear(input_steps, width), nn.ReLU(), nn.Linear(width, horizon)
        )

    def forward(self, speed: Tensor, **others: Tensor) -> Tensor:
        """Return [B, horizon, N] for speeds [B, T, N]."""
        if not isinstance(speed, FakeTensor) and self.training:
            self._go_wrong(speed)
        prediction: Tensor = self.layers(speed.transpose(1, 2)).transpose(1, 2)
        return prediction * float("nan") if self.fault == NAN else prediction

    def _go_wrong(self, speed: Tensor) -> None:
        if self.fault == OUT_OF_MEMORY:
            torch.zeros(HOARD_BYTES // 4, device=speed.device)
        elif self.fault == HANG:
            time.sleep(3600)
        elif self.fault == CRASH:
            raise ValueError("this model was told to crash")
        elif self.fault == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
