"""A sketch of the traffic guide's own model, to show where its memory goes.

Not a forecaster: `Alternating` with the guide's faults put back. Attention materialises its
weights (scores, softmax, dropout), the feed-forward layers are four times the width, and every
stage attends over all T*N tokens of the stages before it. Only ever run on fake tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expt.jobs import attention as attention_kernels
from expt.jobs.traffic import alternating
from expt.jobs.traffic.alternating import Alternating
from expt.memory.measuring.ledger import StorageLedger

GUIDE_FFN_RATIO = 4
GUIDE_DROPOUT = 0.1


def materialised_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention with the weights [batch, H, L, S] in memory, as the guide's model has it."""
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
    weights = nn.functional.dropout(scores.softmax(dim=-1), GUIDE_DROPOUT)
    return weights @ values


class LookBackOverAllTokens(alternating.LookBack):
    """Cross-stage attention over every token of every earlier stage at once."""

    def forward(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """Tokens [B,T,N,D], earlier stages' outputs [B,T,N,D] each -> [B,T,N,D]."""
        memory = torch.cat(earlier, dim=1).flatten(1, 2)  # [B, stages*T*N, D]
        attended = self.attention(tokens.flatten(1, 2), memory).reshape(tokens.shape)
        return self.norm(tokens + self.dropout(attended))


def traced_peak_bytes(sizes: Mapping[str, Any], batch_size: int, num_sensors: int) -> int:
    """Return the peak of two fp32 training steps on fake tensors: nothing is allocated."""
    fused = attention_kernels.fused
    look_back = alternating.LookBack
    attention_kernels.fused = materialised_attention
    alternating.LookBack = LookBackOverAllTokens  # type: ignore[misc]
    try:
        with FakeTensorMode(), StorageLedger() as ledger:
            model = Alternating(
                num_sensors=num_sensors, input_steps=12, horizon=12, steps_per_day=288, **sizes
            )
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            speed = torch.randn(batch_size, 12, num_sensors)
            steps = torch.zeros(batch_size, 12, dtype=torch.int64)
            for _ in range(2):
                model(speed, speed > 0, steps, steps).abs().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return ledger.peak_bytes
    finally:
        attention_kernels.fused = fused
        alternating.LookBack = look_back  # type: ignore[misc]
