"""LoRA on the upper layers of a backbone's language part (Hu et al., ICLR 2022), by PEFT."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from expt.errors import ConfigError, nearest
from expt.jobs.vla.backbone import LORA, Backbone


def add_lora(
    backbone: Backbone,
    first_layer: int,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | None,
) -> list[str]:
    """Put an adapter on linear layers from `first_layer` on; return their names.

    Args:
        backbone: frozen; in place.
        first_layer: of the language part, counted from 0.
        rank: of the two factors.
        alpha: what they add is multiplied by alpha / rank.
        dropout: before the first factor.
        targets: patterns of names, like ``q_proj`` or ``*attention*``; None: every linear layer.
            Only layers of the language part are meant, though others may have such names too.

    Raises:
        ConfigError: a pattern matches none of them, or the rank is above the width of one.

    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name: part for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    layers = backbone.layers()
    inside = {id(part) for layer in layers[first_layer:] for part in layer.modules()}
    below = {id(part) for layer in layers[:first_layer] for part in layer.modules()}
    own = {name: part for name, part in linear.items() if id(part) in inside}
    chosen: list[str] = list(own) if targets is None else []
    for pattern in targets or ():
        found = [name for name in own if _matches(name, pattern)]
        if not found:
            raise ConfigError(_nothing(pattern, linear, list(own), below))
        chosen += [name for name in found if name not in chosen]
    widest = min(chosen, key=lambda name: min(own[name].in_features, own[name].out_features))
    width = min(own[widest].in_features, own[widest].out_features)
    if rank > width:
        raise ConfigError(
            f"model.rank={rank} is above the width of {widest} ({width}), where LoRA would have "
            f"more weights than the layer; try model.rank={max(1, width // 4)}"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(chosen), bias="none"
    )
    inject_adapter_in_model(config, backbone)
    for name, weight in backbone.named_parameters():
        weight.requires_grad_(LORA in name)
    return sorted(chosen)


def adapted(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers with an adapter."""
    from peft.tuners.lora import LoraLayer

    return [module for module in backbone.modules() if isinstance(module, LoraLayer)]


def cast_by_autocast(layers: Sequence[nn.Module], device: str) -> None:
    """Leave the types of what enters the adapters to autocast, where it is on.

    PEFT would make a copy in float32 first, and autocast one of the copy, which backward keeps.
    """
    wanted = not torch.is_autocast_enabled(device)
    for layer in layers:
        vars(layer)["cast_input_dtype_enabled"] = wanted


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _nothing(pattern: str, linear: dict[str, nn.Linear], own: list[str], below: set[int]) -> str:
    """Return what is wrong with a pattern that matches no layer that may have an adapter."""
    elsewhere = [name for name in linear if _matches(name, pattern)]
    if any(id(linear[name]) in below for name in elsewhere):
        return (
            f"model.targets: {pattern!r} matches only layers below model.live_layers, which are "
            "frozen; raise model.live_layers"
        )
    if elsewhere:
        return (
            f"model.targets: {pattern!r} matches the vision tower ({elsewhere[0]}) and no layer of "
            "the language part; LoRA is put on language layers only"
        )
    kinds = sorted({name.rpartition(".")[2] for name in own})
    return f"model.targets: {pattern!r} matches no linear layer; {nearest(pattern, kinds)}"
