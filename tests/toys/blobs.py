"""A job in one class: points of three classes, kept on the device, and a small classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expt.job import Batch, Metric

CLASSES = 3


class Accuracy:
    """Accuracy and mean loss over a split, as sums on the device."""

    def __init__(self) -> None:
        self.right: Tensor | int = 0
        self.loss: Tensor | float = 0.0
        self.count = 0

    def update(self, prediction: Tensor, batch: Batch) -> None:
        self.right = self.right + (prediction.argmax(dim=1) == batch.target).sum()
        self.loss = self.loss + nn.functional.cross_entropy(
            prediction.float(), batch.target, reduction="sum"
        )
        self.count += len(batch)

    def compute(self) -> dict[str, float]:
        return {"accuracy": float(self.right) / self.count, "loss": float(self.loss) / self.count}


class Classification:
    """What the two toy data sets have in common."""

    metrics = (
        Metric("accuracy", goal="max", label="accuracy", percent=True),
        Metric("loss", label="cross-entropy"),
    )

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(prediction.float(), batch.target, reduction="sum")

    def accumulator(self) -> Accuracy:
        return Accuracy()


class Blobs(Classification):
    """Points around three centres; `spread` decides how far the classes overlap.

    The parts that `empty` names have no samples.
    """

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        spread: float = 0.5,
        empty: tuple[str, ...] | list[str] = (),
    ) -> None:
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        generator = torch.Generator().manual_seed(0)
        self.sizes = {"train": 96, "val": 48, "test": 48} | dict.fromkeys(empty, 0)
        self.start = {"train": 0, "val": 96, "test": 144}
        self.y = torch.arange(192) % CLASSES
        centres = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        self.x = centres[self.y] + spread * torch.randn(192, 2, generator=generator)

    def to(self, device: torch.device) -> None:
        self.x, self.y = self.x.to(device), self.y.to(device)

    def size(self, split: str) -> int:
        return self.sizes[split]

    def gather(self, split: str, indices: Tensor) -> Batch:
        at = indices + self.start[split]
        return Batch({"x": self.x[at]}, self.y[at])

    def weight(self, split: str, indices: Tensor) -> Tensor:
        return torch.tensor(float(len(indices)), device=self.x.device)

    def model_arguments(self) -> Mapping[str, Any]:
        return {"num_inputs": 2, "num_classes": CLASSES}

    def fingerprint(self) -> str:
        return f"blobs-{self.x.sum():.3f}"


class Classifier(nn.Module):
    """One hidden layer, with or without batch normalisation."""

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        width: int,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, width), norm, nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))
