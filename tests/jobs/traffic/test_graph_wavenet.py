"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expt.errors import ConfigError
from expt.jobs.traffic.graph_wavenet import Diffusion, GraphWaveNet, Layer, transitions
from expt.memory.techniques.checkpointing import checkpoint_activations

B, T, N, P, DAY = 3, 12, 5, 6, 288
MISSING, BLOCKS = -3.67, 8
SIZES: dict[str, Any] = {
    "channels": 32,
    "skip_channels": 256,
    "end_channels": 512,
    "dilations": [1, 2, 1, 2, 1, 2, 1, 2],
    "kernel_size": 2,
    "diffusion_steps": 2,
    "node_embed_dim": 10,
    "dropout": 0.3,
}
SHAPES: dict[str, Any] = {
    "num_sensors": N,
    "horizon": P,
    "steps_per_day": DAY,
    "missing_value": MISSING,
    "adjacency": torch.rand(N, N, generator=torch.Generator().manual_seed(3)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**changes: Any) -> GraphWaveNet:
    torch.manual_seed(0)
    return GraphWaveNet(**{**SHAPES, **SIZES, **changes}).eval()


def window() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "speed": torch.randn(B, T, N, generator=generator),
        "observed": torch.rand(B, T, N, generator=generator) > 0.1,
        "time_of_day": torch.arange(T) + torch.tensor([[0], [90], [270]]),
        "day_of_week": torch.tensor([[0], [3], [6]]).expand(B, T),
    }


def gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of a training step whose dropout is drawn from a seed."""
    net.train().zero_grad()
    torch.manual_seed(1)
    net(**window()).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_it_has_the_published_number_of_parameters_but_those_without_effect() -> None:
    net = model(num_sensors=207, horizon=12, adjacency=torch.eye(207))
    found = sum(parameter.numel() for parameter in net.parameters())
    channels, powers = 32, 2 * 3
    residual = channels * channels + channels  # defined in every layer, and not used
    diffusion = (1 + powers) * channels * channels + channels
    assert found + 8 * residual + diffusion + 2 * channels == 309_400
    assert found == 293_688


def test_every_parameter_gets_a_gradient() -> None:
    net = model()
    found = gradients(net)
    assert [name for name, _ in net.named_parameters() if not found[name].any()] == []


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    plain, net = gradients(model()), model()
    assert checkpoint_activations(net) == BLOCKS
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_windows_do_not_mix_but_sensors_do() -> None:
    net, inputs, order = model(), window(), torch.tensor([2, 0, 1])
    forecast = net(**inputs)
    permuted = {name: value[order] for name, value in inputs.items()}
    torch.testing.assert_close(net(**permuted), forecast[order], atol=1e-5, rtol=1e-5)
    changed = inputs["speed"].clone()
    changed[0, :, 0] += 1
    difference = (net(**{**inputs, "speed": changed}) - forecast).abs().amax(dim=1)  # [B, N]
    assert (difference[0] > 1e-6).all()
    torch.testing.assert_close(difference[1:], torch.zeros(2, N))


def test_a_missing_reading_enters_as_the_zero_it_is_stored_as() -> None:
    net, inputs = model(), window()
    inputs["observed"][0, 4, 2] = False
    missing = net(**inputs)
    inputs["observed"][0, 4, 2] = True
    inputs["speed"][0, 4, 2] = MISSING
    torch.testing.assert_close(net(**inputs), missing)
    inputs["speed"][0, 4, 2] = 0.0
    assert (net(**inputs) - missing)[0].abs().max() > 1e-5


def test_statistics_are_counted_once_when_blocks_are_checkpointed() -> None:
    plain, net = model(), model()
    checkpoint_activations(net)
    gradients(plain)
    gradients(net)
    for (name, value), (_, other) in zip(plain.named_buffers(), net.named_buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_the_time_counts_and_the_day_does_not() -> None:
    net, inputs = model(), window()
    forecast = net(**inputs)
    assert (net(**{**inputs, "time_of_day": inputs["time_of_day"] + 5}) - forecast).abs().max() > 0
    assert torch.equal(net(**{**inputs, "day_of_week": inputs["day_of_week"] * 0}), forecast)


def test_it_sees_as_far_as_its_dilations_reach() -> None:
    net, inputs = model(dilations=[1, 2]), window()
    assert net.receptive_field == 4
    forecast = net(**inputs)
    inputs["speed"][:, : T - 4] += 1
    assert torch.equal(net(**inputs), forecast)
    inputs["speed"][:, T - 4] += 1
    assert (net(**inputs) - forecast).abs().max() > 1e-5


def test_diffusion_is_the_sum_over_graphs_and_powers() -> None:
    torch.manual_seed(0)
    part = Diffusion(channels=3, powers=4, diffusion_steps=2, dropout=0.0)
    hidden, graphs = torch.randn(2, 3, N, 4), torch.rand(2, N, N)
    weights = part.mix.weight.squeeze().split(3, dim=1)  # [3, 3] for each of 1 + 2 * 2 powers
    powers = [torch.eye(N)] + [power for graph in graphs for power in (graph, graph @ graph)]
    expected = sum(
        torch.einsum("dc,vw,bcwt->bdvt", weight, power, hidden)
        for weight, power in zip(weights, powers, strict=True)
    )
    expected = expected + part.mix.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(part(hidden, graphs), expected)


def test_a_layer_adds_to_the_last_steps_of_what_came_in_and_skips_with_its_own_last() -> None:
    torch.manual_seed(0)
    diffusion = Diffusion(channels=3, powers=2, diffusion_steps=2, dropout=0.0)
    layer = Layer(3, 7, kernel_size=2, dilation=2, diffusion=diffusion).eval()
    torch.nn.init.zeros_(diffusion.mix.weight)
    torch.nn.init.zeros_(diffusion.mix.bias)
    hidden = torch.randn(2, 3, N, 6)
    following, skip = layer(hidden, torch.rand(1, N, N))
    torch.testing.assert_close(following, hidden[..., 2:], atol=1e-4, rtol=1e-4)
    value, gate = layer.gated(hidden[..., -3:]).chunk(2, dim=1)
    torch.testing.assert_close(skip, layer.skip(value.tanh() * gate.sigmoid()))


def test_the_graph_is_followed_both_ways_and_an_end_of_a_road_leads_nowhere() -> None:
    edges = torch.tensor([[1.0, 3.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    forward, backward = transitions(edges)
    assert forward.tolist() == [[0.25, 0.75, 0], [0, 0.5, 0.5], [0, 0, 0]]
    assert backward.tolist() == [[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0]]


def test_without_a_graph_the_learned_one_is_the_only_one() -> None:
    net = model(adjacency=None)
    assert net.layers[0].diffusion.mix.in_channels == (1 + 2) * 32
    assert net(**window()).shape == (B, P, N)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 1}, "model.kernel_size must be at least 2, got 1"),
        ({"dilations": []}, r"model.dilations must be steps from 1 up, one a layer, got \[\]"),
        ({"dropout": -0.1}, r"model.dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_an_impossible_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**changes)
    assert len(GraphWaveNet.problems({**SIZES, **changes})) == 1
