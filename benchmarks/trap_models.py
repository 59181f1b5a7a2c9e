"""Models for benchmarks/traps.py: each way to waste memory on images, and the part against it.

Letters: `B` samples, `n` images of a sample, `S` tokens of an image, `L` tokens of text, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.jobs.attention import Attention
from expt.jobs.vision.chunks import EncodedInChunks
from expt.jobs.vision.cross_attention import (
    GatedCrossAttention,
    ImageKeyValue,
    LowRankCrossAttention,
    SharedCrossAttention,
)
from expt.jobs.vision.resolution import AdaptiveResolution

CLASSES = 10
CROSS_ATTENTION = ("plain", "tied", "shared", "low rank", "gated")


@dataclass(frozen=True)
class Sizes:
    """How large the tower, the layers on it, and a batch are."""

    width: int
    tower_layers: int
    heads: int
    patch: int
    image: int
    samples: int
    images: int
    layers: int
    text: int
    rank: int
    chunk: int


SMALL = Sizes(64, 4, 4, 7, 56, samples=2, images=8, layers=6, text=16, rank=8, chunk=2)
REAL = Sizes(1024, 24, 16, 14, 336, samples=4, images=8, layers=12, text=512, rank=64, chunk=2)
"""The tower is CLIP ViT-L/14-336's."""


@dataclass(frozen=True)
class Case:
    """A model and its batch: inputs by name, and the classes of the samples [B]."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[dict[str, Tensor], Tensor]]


def loss(forward: Callable[..., Any], batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(forward(**batch[0]).float(), batch[1])


def tower(sizes: Sizes, image: int = 0, trained: bool = True) -> nn.Module:
    """Return the vision model of CLIP at these sizes, without weights from elsewhere."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=sizes.width, intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.tower_layers, num_attention_heads=sizes.heads,
        image_size=image or sizes.image, patch_size=sizes.patch,
    )  # fmt: skip
    return CLIPVisionModel(config).requires_grad_(trained)


class Classifier(nn.Module):
    """The mean of the tokens of all images of a sample, and a linear layer."""

    def __init__(self, encode: nn.Module, width: int) -> None:
        super().__init__()
        self.encode, self.head = encode, nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, n, 3, H, W] -> [B, CLASSES]."""
        return self.head(self.encode(images).flatten(1, -2).mean(1))


class AllAtOnce(nn.Module):
    """All images of a batch through the encoder together: [B, n, 3, H, W] -> [B, n, S, D]."""

    def __init__(self, encoder: nn.Module, interpolated: bool = False) -> None:
        super().__init__()
        self.encoder, self.interpolated = encoder, interpolated

    def forward(self, images: Tensor) -> Tensor:
        """Encode them."""
        found = self.encoder(images.flatten(0, 1), interpolate_pos_encoding=self.interpolated)
        return found.last_hidden_state.unflatten(0, images.shape[:2])


def classified(sizes: Sizes, encode: Callable[[], nn.Module], image: int = 0) -> Case:
    """Return a case whose images are `image` px, by default those of the sizes."""
    side = image or sizes.image
    return Case(
        lambda: Classifier(encode(), sizes.width),
        lambda: (
            {"images": torch.randn(sizes.samples, sizes.images, 3, side, side)},
            torch.randint(CLASSES, (sizes.samples,)),
        ),
    )


def at_once(sizes: Sizes, trained: bool) -> Case:
    return classified(sizes, lambda: AllAtOnce(tower(sizes, trained=trained)))


def in_chunks(sizes: Sizes, trained: bool) -> Case:
    return classified(
        sizes, lambda: EncodedInChunks(tower(sizes, trained=trained), sizes.chunk)
    )  # fmt: skip


def at_resolution(sizes: Sizes, read: int, used: int) -> Case:
    """Return a case that reads images of `read` px and brings them to `used` px."""

    def encode() -> nn.Module:
        encoder = AllAtOnce(tower(sizes), interpolated=True)
        return AdaptiveResolution(encoder, [used], lambda size: size, limit_bytes=used)

    return classified(sizes, encode, read)


def tiled(sizes: Sizes, count: int) -> Case:
    """Return a case of one sample with so many tiles, the thumbnail among them."""
    return at_once(replace(sizes, samples=1, images=count), trained=True)


class Fused(nn.Module):
    """Layers of text, each of cross-attention to the images' tokens and a feed-forward."""

    def __init__(self, sizes: Sizes, kind: str) -> None:
        super().__init__()
        width, heads = sizes.width, sizes.heads
        self.keys_values = ImageKeyValue(width, width) if kind == "shared" else nn.Identity()
        make: dict[str, Callable[[], nn.Module]] = {
            "shared": partial(SharedCrossAttention, width, heads),
            "low rank": partial(LowRankCrossAttention, width, heads, sizes.rank),
            "gated": lambda: GatedCrossAttention(Attention(width, heads)),
        }
        plain = partial(Attention, width, heads)
        self.cross = nn.ModuleList(make.get(kind, plain)() for _ in range(sizes.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * sizes.layers))
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(sizes.layers)
        )
        if kind == "tied":
            for layer in self.cross:
                layer.key_value = self.cross[0].key_value  # type: ignore[union-attr]

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Text [B, L, D] and image [B, n·S, D] -> [B, L, D]."""
        seen = self.keys_values(image)
        for number, (cross, forward) in enumerate(zip(self.cross, self.forwards, strict=True)):
            text = text + cross(self.norms[2 * number](text), seen)
            text = text + forward(self.norms[2 * number + 1](text))
        return text


class Crossed(nn.Module):
    """`Fused` on images that are encoded already."""

    def __init__(self, sizes: Sizes, kind: str) -> None:
        super().__init__()
        self.fused, self.head = Fused(sizes, kind), nn.Linear(sizes.width, CLASSES)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Text [B, L, D] and image [B, n·S, D] -> [B, CLASSES]."""
        return self.head(self.fused(text, image).mean(1))


def crossed(sizes: Sizes, kind: str) -> Case:
    tokens = sizes.images * ((sizes.image // sizes.patch) ** 2 + 1)
    return Case(
        lambda: Crossed(sizes, kind),
        lambda: (
            {
                "text": torch.randn(sizes.samples, sizes.text, sizes.width),
                "image": torch.randn(sizes.samples, tokens, sizes.width),
            },
            torch.randint(CLASSES, (sizes.samples,)),
        ),
    )


class OneByOne(nn.Module):
    """The handbook's forward pass: images one by one in two loops, stacked, then cross-attention.

    With `chunk` they are encoded in chunks instead.
    """

    def __init__(self, sizes: Sizes, kind: str, chunk: int = 0, trained: bool = True) -> None:
        super().__init__()
        encoder = tower(sizes, trained=trained)
        self.tower = EncodedInChunks(encoder, chunk) if chunk else encoder
        self.chunked = bool(chunk)
        self.fused, self.head = Fused(sizes, kind), nn.Linear(sizes.width, CLASSES)

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        """Text [B, L, D] and images [B, n, 3, H, W] -> [B, CLASSES]."""
        encoded = self.tower(images) if self.chunked else self.each(images)
        return self.head(self.fused(text, encoded.flatten(1, 2)).mean(1))

    def each(self, images: Tensor) -> Tensor:
        """Encode images [B, n, 3, H, W] one by one -> [B, n, S, D]."""
        samples = []
        for sample in images:
            features = []
            for image in sample:
                features.append(self.tower(image[None]).last_hidden_state[0])
            samples.append(torch.stack(features))
        return torch.stack(samples)


def one_by_one(sizes: Sizes, kind: str = "plain", chunk: int = 0, trained: bool = True) -> Case:
    return Case(
        lambda: OneByOne(sizes, kind, chunk, trained),
        lambda: (
            {
                "text": torch.randn(sizes.samples, sizes.text, sizes.width),
                "images": torch.randn(sizes.samples, sizes.images, 3, sizes.image, sizes.image),
            },
            torch.randint(CLASSES, (sizes.samples,)),
        ),
    )


def convolved(width: int, sides: Sequence[int]) -> Case:
    """Return convolutions over a batch of square images padded to the largest."""

    def model() -> nn.Module:
        layers = [nn.Conv2d(3 if not i else width, width, 3, padding=1) for i in range(4)]
        flat = [part for layer in layers for part in (layer, nn.ReLU())]
        return nn.Sequential(
            *flat, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)
        )

    largest = max(sides)
    return Case(
        model,
        lambda: (
            {"input": torch.randn(len(sides), 3, largest, largest)},
            torch.randint(CLASSES, (len(sides),)),
        ),
    )
