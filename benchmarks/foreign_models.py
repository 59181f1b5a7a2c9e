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


class UNet(nn.Module):
    """Down, up, and what was before beside it (Ronneberger et al., arXiv:1505.04597)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down(x))
        deep = F.relu(self.deep(F.max_pool2d(first, 2)))
        out = F.relu(self.out(torch.cat([self.up(deep), first], 1)))
        return self.head(out.mean((2, 3)))


class Experts(nn.Module):
    """A mixture of experts, each of which gets the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(128, 4)
        self.experts = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, chosen = self.gate(rows).softmax(-1).topk(1, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at = (chosen[:, 0] == number).nonzero()[:, 0]
            out = out.index_add(0, at, expert(rows[at]) * weight[at])
        return self.head(out.view_as(x).mean(1))


class Gathered(nn.Module):
    """Indexing, gathering, taking and scattering."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        order = torch.arange(hidden.shape[1] - 1, -1, -1)
        turned = hidden[:, order] + hidden.index_select(1, order)
        picked = turned.gather(1, order.view(1, -1, 1).expand_as(turned))
        return self.head(torch.zeros_like(picked).scatter_add(1, order.view(1, -1, 1)
                         .expand_as(picked), picked).mean(1))  # fmt: skip


class Products(nn.Module):
    """Products, running products and the largest element."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(x)) + 0.5
        return self.head(hidden.cumprod(1).mean(1) + hidden.prod(1) + hidden.amax(1))


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % x.shape[1] + 1
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return self.head(self.cell(packed)[1][-1])


class Mixer(nn.Module):
    """Layers over time and over channels in turn (Tolstikhin et al., arXiv:2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
        self.channels = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for time, channel in zip(self.times, self.channels, strict=True):
            x = x + F.gelu(time(self.norm(x).transpose(1, 2))).transpose(1, 2)
            x = x + F.gelu(channel(self.norm(x)))
        return self.head(x.mean(1))


def temporal() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, dilation in ((64, 1), (128, 2), (128, 4)):
        layers += [nn.Conv1d(inputs, 128, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10))


def depthwise() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 24), (24, 48), (48, 96)):
        layers += [
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv2d(inputs, outputs, 1),
            nn.GroupNorm(3, outputs), nn.SiLU(), nn.AvgPool2d(2),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def hourglass() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def frozen() -> nn.Module:
    return nn.Sequential(resnet()[:-1].requires_grad_(False), nn.Linear(256, 10))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=2, use_cache=False,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=4096, hidden_size=192, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=6,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False,
        )
    )  # fmt: skip


def tokens(words: int) -> Callable[[int], Batch]:
    return lambda size: (torch.randint(words, (size, 128)), torch.randint(words, (size, 128)))


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
    "u_net": ForeignModel(UNet, floats(3, 64, 64), classify),
    "experts": ForeignModel(Experts, floats(64, 128), classify),
    "gathered": ForeignModel(Gathered, floats(128, 128), classify),
    "products": ForeignModel(Products, floats(128, 128), classify),
    "packed": ForeignModel(Packed, floats(64, 64), classify),
    "mixer": ForeignModel(Mixer, floats(128, 128), classify),
    "temporal": ForeignModel(temporal, floats(64, 256), classify),
    "depthwise": ForeignModel(depthwise, floats(3, 64, 64), classify),
    "hourglass": ForeignModel(hourglass, floats(3, 64, 64), classify),
    "frozen": ForeignModel(frozen, floats(3, 64, 64), classify),
    "llama": ForeignModel(llama, tokens(4096), language),
    "bert": ForeignModel(bert, tokens(4096), language),
    "mixtral": ForeignModel(mixtral, tokens(2048), language),
}
