"""A job with a frozen part: pictures, four blocks of which the top is trained, and a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from blobs import CLASSES, Classification
from torch import Tensor, nn

from expt.job import Batch, StreamedDataSet

SIDE = 12
SIZES = {"train": 44, "val": 12, "test": 12}


class Whole(Classification):
    """Noise with a bright row whose place is the class, and a number that is drawn anew."""

    def __init__(
        self, batch_size: int, eval_batch_size: int, pixels: int = SIDE, augments: bool = False,
        hidden_augmentation: bool = False, broken: int | None = None,
    ) -> None:  # fmt: skip
        self.batch_size, self.eval_batch_size, self.pixels = batch_size, eval_batch_size, pixels
        self.augments, self.hidden, self.broken = augments, hidden_augmentation, broken
        self.left_out: tuple[str, ...] = ()

    def size(self, split: str) -> int:
        return SIZES[split]

    def item(self, split: str, index: int, generator: torch.Generator) -> Batch:
        label = index % CLASSES
        noise = torch.randn((), generator=generator)
        inputs = {"noise": noise}
        if "image" not in self.left_out:
            Pictures.reads += 1
            if index == self.broken and split == "train":
                raise ValueError("a broken picture")
            own = torch.Generator().manual_seed(1000 * len(split) + index)
            image = torch.randn(self.pixels, self.pixels, generator=own)
            image[2 * label] += 2.0
            if self.hidden:
                image += torch.rand((), generator=generator)
            inputs["image"] = image
        return Batch(inputs, torch.tensor(label))

    def model_arguments(self) -> Mapping[str, Any]:
        return {"pixels": self.pixels}

    def fingerprint(self) -> str:
        return f"pictures-{self.pixels}"


class Pictures(Whole):
    """The same, which can do without pictures; `reads` counts them."""

    reads = 0

    def without(self, inputs: Sequence[str]) -> StreamedDataSet:
        other = Pictures(self.batch_size, self.eval_batch_size, self.pixels, broken=self.broken)
        other.left_out = tuple(inputs)
        return other


class Embed(nn.Module):
    """A layer with a buffer, which is no parameter and leaves with it."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, width)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(image) * self.scale


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout))
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(self.norm(x)))


class Deep(nn.Module):
    """Rows of a picture as tokens; the lower `frozen` of the blocks are not trained."""

    def __init__(
        self, pixels: int, width: int = 16, depth: int = 4, frozen: int = 2, dropout: float = 0.1,
        train_all: bool = False, modes: Sequence[str] = ("prefix", "vision", "alternating"),
    ) -> None:  # fmt: skip
        super().__init__()
        self.feature_modes = tuple(modes)
        self.frozen = frozen
        self.embed: nn.Module = Embed(pixels, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width + 1, CLASSES)
        if not train_all:
            for part in (self.embed, *self.blocks[:frozen]):
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> Deep:
        super().train(mode)
        for part in (self.embed, *self.blocks[: self.frozen]):
            if part is not None and not next(iter(part.parameters()), torch.ones(0)).requires_grad:
                part.eval()
        return self

    def forward(
        self, noise: Tensor, image: Tensor | None = None, prefix: Tensor | None = None,
        vision: Tensor | None = None, hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if hidden is None:
            given = {"image": image, "vision": vision, "prefix": prefix}
            hidden = self.features("alternating", **given)["hidden"]
        return self.head(torch.cat([hidden.mean(dim=1), noise[:, None]], dim=1))

    def feature_inputs(self, mode: str) -> Sequence[str]:
        return ["image"]

    def features(
        self, mode: str, image: Tensor | None = None, vision: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        x = vision if vision is not None or prefix is not None else self.embed(image)
        if mode == "vision":
            return {"vision": x}
        if prefix is None:
            for block in self.blocks[: self.frozen]:
                x = block(x)
        else:
            x = prefix
        if mode == "prefix":
            return {"prefix": x}
        for block in self.blocks[self.frozen :]:
            x = block(x)
        return {"hidden": x}

    def frozen_part(self, mode: str) -> Iterable[tuple[str, nn.Module]]:
        yield "embed", self.embed
        if mode == "prefix":
            for number, block in enumerate(self.blocks[: self.frozen]):
                yield f"blocks.{number}", block

    def without_frozen_part(self, mode: str) -> None:
        self.embed = nn.Identity()
        if mode == "prefix":
            for number in range(self.frozen):
                self.blocks[number] = nn.Identity()
