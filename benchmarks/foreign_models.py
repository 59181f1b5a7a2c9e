"""Models that are not ours, for benchmarks of the plan: built from plain torch or a config.

Each entry: how to build the model, a micro-batch for a batch size, and the loss. Nothing here
knows about the planner, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ForeignModel:
    """A model, its data and its loss, as somebody else's training script would have them."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Callable[..., Any], Batch], Tensor]


def classify(forward: Callable[..., Any], batch: Batch) -> Tensor:
    return F.cross_entropy(forward(batch[0]), batch[1])


def classify_hf(forward: Callable[..., Any], batch: Batch) -> Tensor:
    return F.cross_entropy(forward(batch[0]).logits, batch[1])


def language(forward: Callable[..., Any], batch: Batch) -> Tensor:
    logits = forward(batch[0]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


class Pooled(nn.Module):
    """A sequence encoder, mean over time, and a classifier."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 10) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x)
        encoded = encoded[0] if isinstance(encoded, tuple) else encoded
        return self.head(encoded.mean(dim=1))


class Residual(nn.Module):
    """ResNet's basic block (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm_one(self.one(x)), inplace=True)
        return F.relu(self.norm_two(self.two(hidden)) + self.skip(x))


def resnet() -> nn.Module:
    widths = (32, 32, 64, 128, 256)
    blocks = [
        Residual(a, b, 1 if index == 0 else 2) for index, (a, b) in enumerate(pairwise(widths))
    ]
    stem = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def cnn_3d() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(),
            nn.MaxPool3d(2),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    sizes = (256, 2048, 2048, 2048)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(2048, 10))


class Embedding(nn.Module):
    """Mostly one table: recommendation-like."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60_000, 128)
        self.head = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(dim=1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
    return Pooled(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), 128)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4096, n_positions=256, n_embd=192, n_layer=4, n_head=6, use_cache=False
    )
    return GPT2LMHeadModel(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def floats(*shape: int) -> Callable[[int], Batch]:
    return lambda size: (torch.randn(size, *shape), torch.randint(10, (size,)))


MODELS: dict[str, ForeignModel] = {
    "transformer": ForeignModel(encoder, floats(128, 128), classify),
    "lstm": ForeignModel(
        lambda: Pooled(nn.LSTM(64, 256, 2, batch_first=True), 256), floats(64, 64), classify
    ),
    "gru": ForeignModel(
        lambda: Pooled(nn.GRU(64, 256, 2, batch_first=True), 256), floats(64, 64), classify
    ),
    "resnet": ForeignModel(resnet, floats(3, 64, 64), classify),
    "cnn_3d": ForeignModel(cnn_3d, floats(3, 16, 48, 48), classify),
    "gpt2": ForeignModel(
        gpt2,
        lambda size: (torch.randint(4096, (size, 256)), torch.randint(4096, (size, 256))),
        language,
    ),
    "vit": ForeignModel(vit, floats(3, 64, 64), classify_hf),
    "mlp": ForeignModel(mlp, floats(256), classify),
    "embedding": ForeignModel(
        Embedding,
        lambda size: (torch.randint(60_000, (size, 64)), torch.randint(10, (size,))),
        classify,
    ),
}
