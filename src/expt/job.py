"""The interfaces between the parts; a class that has these methods fits, no base class needed.

How to add a model: a `torch.nn.Module` whose `forward` takes the data's inputs by name and
returns a prediction. Its constructor may ask, by name, for anything in
`DataSet.model_arguments()`; the rest comes from its YAML.

How to add a data set: a class with the methods of `DataSet`, and of `Described` if it likes. For
one more speed series, `expt.jobs.traffic.data.TrafficData` already is that class and a YAML with a
`path` is enough.

Letters: `B` samples in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Batch:
    """`inputs` go to the model by name, ``model(**batch.inputs)``; `target` to the loss."""

    inputs: Mapping[str, Tensor]
    target: Tensor


class Metrics(Protocol):
    """Accumulates over a whole split, so that no figure is a mean of per-batch means."""

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add one batch; must not synchronise with the host."""

    def compute(self) -> dict[str, float]:
        """Return the figures over everything seen; the key ``mae`` (or the data's own) is first."""


class DataSet(Protocol):
    """What the training loop needs from data."""

    batch_size: int
    """Samples per optimizer step; the loop splits it into `memory.gradient_accumulation` parts."""
    eval_batch_size: int
    """Samples per forward pass in evaluation."""
    monitor: str
    """The metric that validation minimises, a key of `Metrics.compute()`."""

    def to(self, device: torch.device) -> None:
        """Move what is kept on the device; called once, before training."""

    def model_arguments(self) -> Mapping[str, Any]:
        """Return what a model's constructor may ask for by name (``num_sensors``, …)."""

    def size(self, split: Split) -> int:
        """Return the number of samples in a split."""

    def gather(self, split: Split, indices: Tensor) -> Batch:
        """Return the samples with these indices [B] (int64, on the device) as one batch."""

    def weight(self, split: Split, indices: Tensor) -> Tensor:
        """Return what the summed loss of these samples is divided by, a scalar on the device."""

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the loss summed over the batch, a scalar; never averaged (see `weight`)."""

    def metrics(self) -> Metrics:
        """Return a new accumulator."""

    def plots(
        self, predict: Callable[[Batch], Tensor], metrics: Metrics, folder: Path
    ) -> Sequence[Path]:
        """Draw forecasts against the truth, and the test's `metrics`; return the PNG files."""

    def fingerprint(self) -> str:
        """Return a short hash of the values, so that two runs can be told to share data."""


@runtime_checkable
class Checked(Protocol):
    """A class that can judge its arguments before it is built."""

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Return one message per impossible value or combination among `arguments`."""


@runtime_checkable
class Described(Protocol):
    """A data set that can say what it holds; optional, and told where a run begins."""

    def describe(self) -> str:
        """Return one line of facts, and one more per warning."""
