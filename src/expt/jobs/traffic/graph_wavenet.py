"""`graph_wavenet`: gated convolutions over time and diffusion over a graph that is partly learned.

Written from Wu et al., "Graph WaveNet for Deep Spatial-Temporal Graph Modeling", IJCAI 2019
(arXiv:1906.00121): dilated causal convolutions with a gate, each followed by a diffusion over the
data's graph in both directions and over a self-adaptive one, softmax(relu(E1 E2^T)), with residual
and skip connections. Without a graph in the data, the self-adaptive one is the only one. Missing
readings enter as zeros, normalised.

`conf/model/graph_wavenet.yaml` has the sizes for METR-LA. The published code has 309,400 parameters
with 207 sensors; 15,712 of them reach no output and are left out here: the last layer's
diffusion and normalisation, and the layers' residual convolutions, which diffusion replaces. Of a
skip connection only the last step is used, and so only that is computed.

Letters: `B` batch, `T` steps, `N` sensors, `C` channels, `S` skip channels, `P` horizon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.errors import ConfigError, share_problems

INPUT_FEATURES = 2  # speed, and time of day as a fraction


class GraphWaveNet(nn.Module):
    """Forecast [B, P, N] (normalised speed).

    Args:
        num_sensors: sensors N, from the data.
        horizon: steps P to forecast, from the data.
        steps_per_day: steps that time of day is a fraction of, from the data.
        missing_value: what a missing reading is after normalisation, from the data.
        adjacency: edge weights [N, N], row = from, column = to, from the data; None: there is none.
        channels: channels C of the layers.
        skip_channels: channels S that the layers' outputs are summed in.
        end_channels: channels between that sum and the forecast.
        dilations: one layer each.
        kernel_size: steps that a convolution looks at.
        diffusion_steps: powers of each graph.
        node_embed_dim: width of E1 and E2, which begin standard normal, as in the published code.
        dropout: after each diffusion.

    Raises:
        ConfigError: with every impossible value among the last eight.

    """

    given: Tensor | None

    def __init__(
        self,
        num_sensors: int,
        horizon: int,
        steps_per_day: int,
        missing_value: float,
        adjacency: Any,
        channels: int,
        skip_channels: int,
        end_channels: int,
        dilations: Sequence[int],
        kernel_size: int,
        diffusion_steps: int,
        node_embed_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        problems = self.problems({key: value for key, value in locals().items() if key != "self"})
        if problems:
            raise ConfigError(problems)
        self.steps_per_day, self.missing_value = steps_per_day, missing_value
        given = [] if adjacency is None else transitions(torch.as_tensor(adjacency).float())
        self.register_buffer("given", torch.stack(given) if given else None)  # [2, N, N]
        self.sources = nn.Parameter(torch.randn(num_sensors, node_embed_dim))
        self.targets = nn.Parameter(torch.randn(num_sensors, node_embed_dim))
        self.receptive_field = 1 + (kernel_size - 1) * sum(dilations)
        self.start = nn.Conv2d(INPUT_FEATURES, channels, 1)
        powers = diffusion_steps * (len(given) + 1)
        last = len(dilations) - 1
        self.layers = nn.ModuleList(
            Layer(
                channels, skip_channels, kernel_size, dilation,
                Diffusion(channels, powers, diffusion_steps, dropout) if place < last else None,
            )
            for place, dilation in enumerate(dilations)
        )  # fmt: skip
        self.end = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(skip_channels, end_channels, 1),
            nn.ReLU(),
            nn.Conv2d(end_channels, horizon, 1),
        )

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge what is known of the arguments; see `expt.job.Checked`."""
        least = {"kernel_size": 2}
        sizes = (
            "channels", "skip_channels", "end_channels", "kernel_size", "diffusion_steps",
            "node_embed_dim",
        )  # fmt: skip
        found = [
            f"model.{name} must be at least {least.get(name, 1)}, got {arguments[name]}"
            for name in sizes
            if name in arguments and arguments[name] < least.get(name, 1)
        ]
        dilations = arguments.get("dilations", [1])
        if not dilations or any(dilation < 1 for dilation in dilations):
            found.append(
                f"model.dilations must be steps from 1 up, one a layer, got {list(dilations)}"
            )
        return found + share_problems("model.dropout", arguments.get("dropout", 0.0))

    def forward(
        self, speed: Tensor, observed: Tensor, time_of_day: Tensor, **others: Tensor
    ) -> Tensor:
        """Forecast from speed [B,T,N], observed [B,T,N] bool and time [B,T] (int64)."""
        readings = torch.where(observed, speed, self.missing_value)
        time = (time_of_day / self.steps_per_day).to(speed.dtype).unsqueeze(2).expand_as(speed)
        hidden = torch.stack((readings, time), dim=1).transpose(2, 3)  # [B, 2, N, T]
        short = self.receptive_field - hidden.shape[-1]
        hidden = self.start(F.pad(hidden, (max(short, 0), 0)))
        adaptive = (self.sources @ self.targets.T).relu().softmax(dim=1).unsqueeze(0)
        graphs = adaptive if self.given is None else torch.cat((self.given, adaptive))
        total: Tensor | None = None
        for layer in self.layers:
            hidden, skip = layer(hidden, graphs)
            total = skip if total is None else total + skip
        forecast: Tensor = self.end(total).squeeze(-1)  # [B, P, N]
        return forecast


class Layer(nn.Module):
    """One gated convolution and diffusion, with its skip connection.

    `forward(hidden [B,C,N,T], graphs [G,N,N])` -> (the next layer's [B,C,N,T'], skip [B,S,N,1]).
    """

    def __init__(
        self,
        channels: int,
        skip_channels: int,
        kernel_size: int,
        dilation: int,
        diffusion: Diffusion | None,
    ) -> None:
        super().__init__()
        self.gated = nn.Conv2d(channels, 2 * channels, (1, kernel_size), dilation=(1, dilation))
        self.skip = nn.Conv2d(channels, skip_channels, 1)
        self.diffusion = diffusion
        self.norm = nn.Identity() if diffusion is None else nn.BatchNorm2d(channels)

    def forward(self, hidden: Tensor, graphs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the next layer gets, and the part of the sum of skip connections."""
        value, gate = self.gated(hidden).chunk(2, dim=1)
        encoded = value.tanh() * gate.sigmoid()  # [B, C, N, T']
        skip = self.skip(encoded[..., -1:])
        if self.diffusion is None:
            return encoded, skip
        mixed = self.diffusion(encoded, graphs) + hidden[..., -encoded.shape[-1] :]
        return self.norm(mixed), skip


class Diffusion(nn.Module):
    """Mix what reaches a sensor over every graph in 0, 1, ..., K steps."""

    def __init__(self, channels: int, powers: int, diffusion_steps: int, dropout: float) -> None:
        super().__init__()
        self.diffusion_steps = diffusion_steps
        self.mix = nn.Conv2d((1 + powers) * channels, channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, graphs: Tensor) -> Tensor:
        """Hidden [B,C,N,T], graphs [G,N,N], of which each row sums to 1 -> [B,C,N,T]."""
        reached = [hidden]
        for graph in graphs:
            moved = hidden
            for _ in range(self.diffusion_steps):
                moved = torch.einsum("vw,bcwt->bcvt", graph, moved)
                reached.append(moved)
        mixed: Tensor = self.dropout(self.mix(torch.cat(reached, dim=1)))
        return mixed


def transitions(adjacency: Tensor) -> list[Tensor]:
    """Return the graph's forward and backward transition matrices [N, N]; rows sum to 1 or 0."""
    both = (adjacency, adjacency.T)
    return [weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12) for weights in both]
