"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expt.errors import ConfigError
from expt.jobs.traffic.alternating import Alternating
from expt.jobs.traffic.phase1 import Phase1

B, T, N, P, DAY = 3, 12, 5, 6, 288
SHAPES = {"num_sensors": N, "input_steps": T, "horizon": P, "steps_per_day": DAY}
SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "ffn_ratio": 2, "dropout": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**changes: Any) -> Phase1:
    torch.manual_seed(0)
    return Phase1(**{**SHAPES, **SMALL, **changes}).eval()


def window() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "speed": torch.randn(B, T, N, generator=generator),
        "observed": torch.rand(B, T, N, generator=generator) > 0.1,
        "time_of_day": torch.arange(T) + torch.tensor([[0], [90], [270]]),
        "day_of_week": torch.tensor([[0], [3], [6]]).expand(B, T),
    }


def test_the_forecast_has_a_value_per_window_step_and_sensor() -> None:
    assert model()(**window()).shape == (B, P, N)


def test_every_parameter_gets_a_gradient() -> None:
    net = model()
    net(**window()).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_the_forecast_is_not_flat() -> None:
    assert (model()(**window()).diff(dim=1).abs() > 1e-6).all()


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


def test_a_missing_reading_is_not_an_observed_mean() -> None:
    net, inputs = model(), window()
    inputs["speed"][0, 4, 2] = 0.0
    flags = [inputs["observed"].clone() for _ in range(2)]
    flags[0][0, 4, 2], flags[1][0, 4, 2] = True, False
    observed, missing = (net(**{**inputs, "observed": flag}) for flag in flags)
    assert (observed[0] - missing[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 18}, "model.embed_dim=18 is not divisible by model.num_heads=4"),
        ({"ffn_ratio": 0}, "model.ffn_ratio must be at least 1, got 0"),
        ({"dropout": 1.5}, r"model.dropout must be in \[0, 1\), got 1.5"),
    ],
)
def test_an_impossible_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**changes)
    assert len(Phase1.problems({**SMALL, **changes})) == 1


@pytest.mark.parametrize("width", [48, 64])
def test_it_is_smaller_than_every_other_rung_of_the_ladder(width: int) -> None:
    shapes = {**SHAPES, "num_sensors": 207, "horizon": 12}
    fallback = Phase1(**shapes, **{**SMALL, "embed_dim": width})
    minimal = Alternating(
        **shapes,
        **{**SMALL, "embed_dim": width},
        num_layers=1,
        num_stages=2,
        patch_sizes=[1],
        cross_stage_attention=False,
        sensor_dropout=0.0,
    )
    sizes = [sum(p.numel() for p in net.parameters()) for net in (fallback, minimal)]
    assert sizes[0] < sizes[1]
