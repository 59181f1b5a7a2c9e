"""`alternating`: stages of temporal and spatial attention in turn, at several patch scales.

The "phase 3" forecaster of the traffic memory guide with its faults mended. Kept: stages,
patch scales, alternating temporal and spatial encoders, cross-stage attention, the sizes of
the presets. Mended: the guide's model has no positional, time or sensor embedding, repeats one
query over time (so its forecast is flat), and attends over all T*N tokens with the weights
materialised, which is where its memory goes. Here attention runs over time per sensor, then
over sensors per step, by the fused kernel, and one mixing head reads the whole encoded window.

One stage, for each patch size p (steps per token), with its own encoders::

    x [B,T,N,D] -> patches [B,T/p,N,D] -> (temporal layer, spatial layer) x num_layers
                -> unpatched [B,T,N,D]; the stage's output is the mean over scales

With cross-stage attention, every stage after the first lets each sensor's tokens attend over
time to what all earlier stages put out.

Letters: `B` batch, `T` input steps, `N` sensors, `D` width, `p` patch size, `P` horizon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError, share_problems
from expt.jobs.attention import Attention, EncoderLayer
from expt.jobs.traffic.embedding import WindowEmbedding


class Alternating(nn.Module):
    """Forecast [B, P, N] (normalised speed) from one window of readings.

    Args:
        num_sensors: sensors N, from the data.
        input_steps: steps T in the window, from the data.
        horizon: steps P to forecast, from the data.
        steps_per_day: entries of the time-of-day table, from the data.
        embed_dim: width D, divisible by `num_heads`.
        num_heads: attention heads.
        num_layers: (temporal, spatial) pairs per scale and stage.
        num_stages: stages, one after the other.
        patch_sizes: steps per token, one encoder each; every one divides T.
        cross_stage_attention: let later stages attend to earlier ones.
        ffn_ratio: width of the feed-forward layer over D.
        dropout: on every residual branch.
        sensor_dropout: share of sensors whose readings are hidden in training over a random
            stretch of the window, as when a sensor fails; see `hide_readings`.

    Raises:
        ConfigError: with every impossible value among the above.

    """

    def __init__(
        self,
        num_sensors: int,
        input_steps: int,
        horizon: int,
        steps_per_day: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        num_stages: int,
        patch_sizes: Sequence[int],
        cross_stage_attention: bool,
        ffn_ratio: int,
        dropout: float,
        sensor_dropout: float,
    ) -> None:
        super().__init__()
        problems = self.problems({key: value for key, value in locals().items() if key != "self"})
        if problems:
            raise ConfigError(problems)
        self.horizon = horizon
        self.sensor_dropout = sensor_dropout
        self.embedding = WindowEmbedding(num_sensors, input_steps, steps_per_day, embed_dim)
        layer = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "ffn_ratio": ffn_ratio,
            "dropout": dropout,
        }
        self.stages = nn.ModuleList(
            Stage(patch_sizes, num_layers, cross_stage_attention and index > 0, layer)
            for index in range(num_stages)
        )
        self.head = nn.Linear(input_steps * embed_dim, horizon)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge what is known of the arguments; see `expt.job.Checked`."""
        found = [
            f"model.{name} must be at least 1, got {arguments[name]}"
            for name in ("embed_dim", "num_heads", "num_layers", "num_stages", "ffn_ratio")
            if name in arguments and arguments[name] < 1
        ]
        if found:
            return found
        width, heads = arguments.get("embed_dim"), arguments.get("num_heads")
        if width and heads and width % heads:
            found.append(
                f"model.embed_dim={width} is not divisible by model.num_heads={heads}; "
                f"try {width // heads * heads or heads} or {(width // heads + 1) * heads}"
            )
        found += patch_problems(arguments.get("patch_sizes"), arguments.get("input_steps"))
        for name in ("dropout", "sensor_dropout"):
            found += share_problems(f"model.{name}", arguments.get(name, 0.0))
        return found

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, day_of_week: Tensor
    ) -> Tensor:
        """Forecast from speed [B,T,N], observed [B,T,N] bool, time [B,T], day [B,T] (int64)."""
        if self.training and self.sensor_dropout:
            speed, observed = hide_readings(speed, observed, self.sensor_dropout)
        tokens = self.embedding(speed, observed, time_of_day, day_of_week)
        earlier: list[Tensor] = []
        for stage in self.stages:
            tokens = stage(tokens, earlier)
            earlier.append(tokens)
        window = tokens.transpose(1, 2).flatten(2)  # [B, N, T*D]
        return self.head(window).transpose(1, 2)  # type: ignore[no-any-return]


def hide_readings(speed: Tensor, observed: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Hide the readings of a share of sensors over a stretch of the window, drawn per sensor.

    Sensors fail for hours, in some months more often than in others; a model that has seen few
    outages in training reads them wrongly later.
    """
    batch, steps, sensors = speed.shape
    ends = torch.rand(2, batch, 1, sensors, device=speed.device) * steps
    step = torch.arange(steps, device=speed.device).view(1, steps, 1)
    inside = (step >= ends.amin(dim=0).floor()) & (step <= ends.amax(dim=0))
    chosen = torch.rand(batch, 1, sensors, device=speed.device) < share
    observed = observed & ~(inside & chosen)
    return torch.where(observed, speed, 0.0), observed


class Stage(nn.Module):
    """One stage: optional look back at earlier stages, then every scale; mean over scales."""

    def __init__(
        self,
        patch_sizes: Sequence[int],
        num_layers: int,
        cross_stage_attention: bool,
        layer: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.look_back = LookBack(layer) if cross_stage_attention else None
        self.scales = nn.ModuleList(Scale(size, num_layers, layer) for size in patch_sizes)

    def forward(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """Encode tokens [B,T,N,D]; `earlier` holds the outputs of the stages before."""
        if self.look_back is not None:
            tokens = self.look_back(tokens, earlier)
        encoded: Tensor = self.scales[0](tokens)
        for scale in self.scales[1:]:
            encoded = encoded + scale(tokens)
        return encoded / len(self.scales)


class LookBack(nn.Module):
    """Cross-stage attention: each sensor's tokens attend over time to all earlier stages."""

    def __init__(self, layer: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(layer["embed_dim"], layer["num_heads"])
        self.norm = nn.LayerNorm(layer["embed_dim"])
        self.dropout = nn.Dropout(layer["dropout"])

    def forward(self, tokens: Tensor, earlier: list[Tensor]) -> Tensor:
        """Tokens [B,T,N,D], earlier stages' outputs [B,T,N,D] each -> [B,T,N,D]."""
        memory = torch.cat(earlier, dim=1).transpose(1, 2)  # [B, N, stages*T, D]
        attended = self.attention(tokens.transpose(1, 2), memory).transpose(1, 2)
        looked: Tensor = self.norm(tokens + self.dropout(attended))
        return looked


class Scale(nn.Module):
    """Alternating encoders at one patch size; patch size 1 works on the tokens themselves."""

    def __init__(self, patch_size: int, num_layers: int, layer: Mapping[str, Any]) -> None:
        super().__init__()
        width = layer["embed_dim"]
        self.patch_size = patch_size
        if patch_size > 1:
            self.patch = nn.Linear(patch_size * width, width)
            self.unpatch = nn.Linear(width, patch_size * width)
        self.temporal = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_layers))
        self.spatial = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B,T,N,D] -> [B,T,N,D]."""
        size = self.patch_size
        patches = tokens.transpose(1, 2)  # [B, N, T, D]
        if size > 1:
            patches = self.patch(patches.unflatten(2, (-1, size)).flatten(3))  # [B, N, T/p, D]
        for temporal, spatial in zip(self.temporal, self.spatial, strict=True):
            patches = temporal(patches)
            patches = spatial(patches.transpose(1, 2)).transpose(1, 2)
        if size > 1:
            patches = self.unpatch(patches).unflatten(3, (size, -1)).flatten(2, 3)
        encoded: Tensor = patches.transpose(1, 2)
        return encoded if size == 1 else tokens + encoded


def patch_problems(patch_sizes: Sequence[int] | None, input_steps: int | None) -> list[str]:
    """Return one message per patch size that does not divide the window."""
    if patch_sizes is None:
        return []
    if not patch_sizes:
        return ["model.patch_sizes is empty; give at least [1]"]
    if input_steps is None:
        return []
    divisors = [size for size in range(1, input_steps + 1) if input_steps % size == 0]
    return [
        f"model.patch_sizes has {size}, which does not divide the window of "
        f"data.input_steps={input_steps}; allowed: {divisors}"
        for size in patch_sizes
        if size not in divisors
    ]
