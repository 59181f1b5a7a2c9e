"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expt.errors import ConfigError
from expt.jobs.traffic.staeformer import STAEformer
from expt.memory.techniques.checkpointing import checkpoint_activations

B, T, N, P, DAY = 3, 12, 5, 6, 288
MISSING, BLOCKS = -3.67, 6
SIZES: dict[str, Any] = {
    "input_embed_dim": 24,
    "time_embed_dim": 24,
    "day_embed_dim": 24,
    "adaptive_embed_dim": 80,
    "feed_forward_dim": 256,
    "num_heads": 4,
    "num_layers": 3,
    "dropout": 0.1,
}
SHAPES: dict[str, Any] = {
    "num_sensors": N,
    "input_steps": T,
    "horizon": P,
    "steps_per_day": DAY,
    "missing_value": MISSING,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**changes: Any) -> STAEformer:
    torch.manual_seed(0)
    return STAEformer(**{**SHAPES, **SIZES, **changes}).eval()


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


def test_it_has_the_published_number_of_parameters() -> None:
    """As the authors' own log of a METR-LA training lists them, part by part."""
    attention, norm, feed_forward = 93_024, 304, 78_232
    expected = {
        "adaptive": 198_720,
        "reading": 96,
        "time_of_day": 6_912,
        "day_of_week": 168,
        "temporal": 3 * (attention + feed_forward + 2 * norm),
        "spatial": 3 * (attention + feed_forward + 2 * norm),
        "head": 21_900,
    }
    found = dict.fromkeys(expected, 0)
    for name, parameter in model(num_sensors=207, horizon=12).named_parameters():
        found[name.partition(".")[0]] += parameter.numel()
    assert found == expected
    assert sum(found.values()) == 1_258_980


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


@pytest.mark.parametrize("name", ["time_of_day", "day_of_week"])
def test_the_time_counts(name: str) -> None:
    net, inputs = model(), window()
    later = {**inputs, name: (inputs[name] + 1) % 7}
    assert (net(**later) - net(**inputs)).abs().max() > 1e-4


def test_the_learned_table_knows_the_place_of_a_step() -> None:
    net, inputs = model(), window()
    same = {
        name: value[:, :1].expand(B, T, *value.shape[2:]).contiguous()
        for name, value in inputs.items()
    }
    forecast = net(**same)
    with torch.no_grad():
        net.adaptive[3] += 1
    assert (net(**same) - forecast).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive_embed_dim": 81}, "the width 153, .* not divisible by model.num_heads=4"),
        ({"num_layers": 0}, "model.num_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_an_impossible_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**changes)
    assert len(STAEformer.problems({**SIZES, **changes})) == 1
