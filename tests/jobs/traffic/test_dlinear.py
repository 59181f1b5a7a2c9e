"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expt.errors import ConfigError
from expt.jobs.traffic.dlinear import DLinear

B, T, N, P = 3, 12, 5, 6
MISSING = -3.67


def model(moving_average: int = 5) -> DLinear:
    torch.manual_seed(0)
    return DLinear(T, P, MISSING, moving_average)


def window() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "speed": torch.randn(B, T, N, generator=generator),
        "observed": torch.rand(B, T, N, generator=generator) > 0.1,
        "time_of_day": torch.arange(T).expand(B, T),
        "day_of_week": torch.zeros(B, T, dtype=torch.int64),
    }


@pytest.mark.parametrize(("steps", "horizon", "count"), [(96, 720, 139_680), (12, 12, 312)])
def test_it_has_the_published_number_of_parameters(steps: int, horizon: int, count: int) -> None:
    """Table 8 of the paper: 139.7 K, for 96 steps in and 720 out."""
    net = DLinear(steps, horizon, MISSING, 25)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("moving_average", [5, 25])
def test_it_is_the_sum_of_two_maps_of_a_moving_average_and_the_rest(moving_average: int) -> None:
    net, inputs = model(moving_average), window()
    readings = torch.where(inputs["observed"], inputs["speed"], MISSING)  # [B, T, N]
    places = torch.arange(T)
    around = places.view(-1, 1) + torch.arange(moving_average) - moving_average // 2
    trend = readings[:, around.clamp(0, T - 1)].mean(dim=2)
    expected = net.trend(trend.transpose(1, 2)) + net.seasonal((readings - trend).transpose(1, 2))
    torch.testing.assert_close(net(**inputs), expected.transpose(1, 2))


def test_neither_windows_nor_sensors_mix() -> None:
    net, inputs = model(), window()
    forecast = net(**inputs)
    inputs["speed"][0, :, 3] += 1
    difference = (net(**inputs) - forecast).abs().amax(dim=1)  # [B, N]
    assert difference.nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("moving_average", [4, 0, -1])
def test_an_average_without_a_middle_is_refused(moving_average: int) -> None:
    with pytest.raises(ConfigError, match=f"must be an odd number of steps, got {moving_average}"):
        model(moving_average)
