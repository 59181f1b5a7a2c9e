"""Residual networks over frames (2D) or over clips (3D), as features of a vector each.

He et al., "Deep Residual Learning", CVPR 2016; in 3D as in Hara et al., "Can Spatiotemporal 3D
CNNs Retrace the History of 2D CNNs and ImageNet?", CVPR 2018.

Letters: `B` samples, `C` channels, `...` frames and pixels, or pixels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from expt.errors import nearest

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of the four stages by depth; from 50 on they are bottlenecks."""
EXPANSION = 4
CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN_POOL = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class ResNet(nn.Sequential):
    """A vector of `features` values for every sample.

    Args:
        dimensions: 2, or 3 with frames as the first.
        depth: 18, 34 or 50.
        width: channels of the first stage; 64 as published.
        kernel: of the first convolution, along each dimension.
        stride: of the first convolution.
        pool: halve every dimension after it.
        channels: of the samples.

    """

    def __init__(
        self,
        dimensions: Literal[2, 3],
        depth: int,
        width: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        pool: bool,
        channels: int = 3,
    ) -> None:
        block = Bottleneck if depth >= 50 else BasicBlock
        padding = tuple(size // 2 for size in kernel)
        convolution: Any = CONVOLUTION[dimensions]
        stem = convolution(channels, width, tuple(kernel), tuple(stride), padding, bias=False)
        layers: list[nn.Module] = [stem, NORM[dimensions](width), nn.ReLU(inplace=True)]
        if pool:
            layers.append(MAX_POOL[dimensions](3, 2, 1))
        channels = width
        for number, count in enumerate(LAYERS[depth]):
            inner = width * 2**number
            blocks: list[nn.Module] = []
            for place in range(count):
                blocks.append(block(dimensions, channels, inner, 2 if number and not place else 1))
                channels = inner * block.expansion
            layers.append(nn.Sequential(*blocks))
        super().__init__(*layers, MEAN_POOL[dimensions](1), nn.Flatten())
        self.features = channels


class BasicBlock(nn.Module):
    """Two convolutions around which the input is carried."""

    expansion = 1

    def __init__(self, dimensions: int, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(dimensions, channels, inner, 3, stride)
        self.second = _convolution(dimensions, inner, inner, 3)
        self.shortcut = _shortcut(dimensions, channels, inner, stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, inner, ...] of [B, channels, ...]."""
        found: Tensor = self.act(self.second(self.act(self.first(x))) + self.shortcut(x))
        return found


class Bottleneck(nn.Module):
    """A convolution between two that make its channels fewer and more again."""

    expansion = EXPANSION

    def __init__(self, dimensions: int, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(dimensions, channels, inner, 1)
        self.second = _convolution(dimensions, inner, inner, 3, stride)
        self.third = _convolution(dimensions, inner, inner * EXPANSION, 1)
        self.shortcut = _shortcut(dimensions, channels, inner * EXPANSION, stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 4 inner, ...] of [B, channels, ...]."""
        inner = self.act(self.second(self.act(self.first(x))))
        found: Tensor = self.act(self.third(inner) + self.shortcut(x))
        return found


def depth_problem(name: str, depth: Any) -> str | None:
    """Return what is wrong with a depth that a setting gives, None if nothing."""
    if depth in LAYERS:
        return None
    return f"{name}={depth!r} is no depth; {nearest(str(depth), map(str, LAYERS))}"


def _convolution(
    dimensions: int, channels: int, out: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    layer = CONVOLUTION[dimensions](channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, NORM[dimensions](out))


def _shortcut(dimensions: int, channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return _convolution(dimensions, channels, out, 1, stride)
