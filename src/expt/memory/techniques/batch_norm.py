"""Batch normalisation, and how to keep a split batch exact.

A layer that normalises over the batch sees the samples of one forward pass. When a step is cut
into micro-batches, by `gradient_accumulation` or by recovery, its statistics are of fewer samples,
and the step is another one: cut in two, the gradient of a small 3D ResNet on eight clips had a
cosine of 0.36 to that of the whole batch. `frozen` uses the running statistics in training too,
`group` normalises every sample by itself (Wu & He, Group Normalization, ECCV 2018).
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from expt.memory.techniques.wrapping import bare

BatchNorm = Literal["batch", "frozen", "group"]
MAX_GROUPS = 32
"""Groups of channels, where the number of channels can be divided by so many (Wu & He, 4.1)."""


def set_batch_norm(model: nn.Module, mode: BatchNorm) -> int:
    """Change every layer of batch normalisation, in place; return how many there are.

    Weights and biases stay the same parameters, so that an optimizer may have been made before.
    With ``group`` the running statistics go. ``batch`` leaves the model as it is.
    """
    layers = [
        (parent, name, layer)
        for parent in list(bare(model).modules())
        for name, layer in parent.named_children()
        if isinstance(layer, _BatchNorm)
    ]
    for parent, name, layer in layers:
        if mode == "frozen":
            layer.train(False)
            layer.train = MethodType(_stay_in_evaluation, layer)  # type: ignore[method-assign]
        elif mode == "group":
            setattr(parent, name, _group_norm(layer))
    return len(layers)


def batch_statistics(model: nn.Module) -> list[str]:
    """Return the names of layers that normalise over the batch while the model trains."""
    return [
        name
        for name, layer in bare(model).named_modules()
        if isinstance(layer, _BatchNorm)
        and not (isinstance(vars(layer).get("train"), MethodType) and layer.track_running_stats)
    ]


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the float buffers that a forward pass in training writes, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, layer in model.named_modules()
        if isinstance(layer, _NormBase)
        for name, value in layer.named_buffers(recurse=False)
        if value.is_floating_point()
    }


def _stay_in_evaluation(self: nn.Module, mode: bool = True) -> nn.Module:
    """Stand for `train` of a frozen layer; the statistics are never those of a batch."""
    return nn.Module.train(self, False)


def _group_norm(layer: _BatchNorm) -> nn.GroupNorm:
    groups = math.gcd(layer.num_features, MAX_GROUPS)
    if isinstance(layer, nn.BatchNorm1d):
        groups = 1  # there may be no positions to normalise over, only channels
    elif groups == layer.num_features:
        groups = max(groups // 2, 1)  # two channels in a group at least
    norm = nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=False)
    if layer.affine:
        norm.affine, norm.weight, norm.bias = True, layer.weight, layer.bias
    norm.train(layer.training)
    return norm
