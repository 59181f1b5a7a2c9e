"""Averaged weights: validate and test an exponential moving average of what training walks over.

The average is kept beside the weights (one more copy of the parameters) and exchanged with them
for a validation; training itself is not touched by it. Source: Polyak & Juditsky, SIAM J.
Control Optim. 30(4), 1992; the exponential form as in `torch.optim.swa_utils`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from expt.memory.techniques.batch_norm import running_statistics


class NoAverage:
    """The weights as they are."""

    def update(self, step: int) -> None:
        """Do nothing."""

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Leave the weights as they are."""
        yield

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class WeightAverage(NoAverage):
    """An exponential moving average of a model's trained parameters and running statistics.

    `update` after every optimizer step; inside `exchanged` the model has the averaged weights.
    The running statistics of batch normalisation belong to the weights that they were measured
    with; other buffers are not trained, and stay as they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights: dict[str, Tensor] = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self._weights |= running_statistics(model)
        self._averages = {name: p.detach().clone() for name, p in self._weights.items()}

    def update(self, step: int) -> None:
        """Move the average towards the weights; in the first of `step`s it follows closely."""
        averages = list(self._averages.values())
        weights = [weight.detach() for weight in self._weights.values()]
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, weights, step)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Let the model have the averaged weights, and its own back afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages; those of a run without any are the weights themselves."""
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(state.get(name, self._weights[name]))

    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self._averages[name] = self._averages[name], weight.data


def average_for(model: nn.Module, decay: float | None) -> NoAverage:
    """Return the average that a decay asks for."""
    return NoAverage() if decay is None else WeightAverage(model, decay)
