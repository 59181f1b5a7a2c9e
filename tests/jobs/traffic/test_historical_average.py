"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

import torch
from torch import Tensor

from expt.jobs.traffic.historical_average import HistoricalAverage

T, N, P, DAY = 3, 2, 4, 5
WEEK = 7 * DAY


def batch(series: Tensor, observed: Tensor) -> dict[str, Tensor]:
    """Every window [T] of a series [S, N] that begins with a week."""
    steps = torch.arange(len(series) - T + 1).unsqueeze(1) + torch.arange(T)
    return {
        "speed": series[steps],
        "observed": observed[steps],
        "time_of_day": steps % DAY,
        "day_of_week": steps // DAY % 7,
    }


def trained(series: Tensor, observed: Tensor) -> HistoricalAverage:
    net = HistoricalAverage(N, P, DAY).train()
    inputs = batch(series, observed)
    for part in torch.arange(len(inputs["speed"])).split(10):
        net(**{name: value[part] for name, value in inputs.items()})
    return net.eval()


def test_the_mean_at_each_step_of_the_week_is_forecast() -> None:
    series = torch.randn(3 * WEEK, N, generator=torch.Generator().manual_seed(0))
    observed = torch.rand(series.shape, generator=torch.Generator().manual_seed(1)) > 0.1
    net = trained(series, observed)
    seen = observed.clone()
    seen[: T - 1] = False  # no window ends there
    sums = (series * seen).view(3, WEEK, N).sum(dim=0)
    means = sums / seen.view(3, WEEK, N).sum(dim=0)
    inputs = batch(series, observed)
    ends = torch.arange(len(inputs["speed"])) + T - 1
    expected = means[(ends.unsqueeze(1) + torch.arange(1, P + 1)) % WEEK]
    assert expected.isfinite().all()
    torch.testing.assert_close(net(**inputs), expected)


def test_evaluation_and_a_second_epoch_change_nothing() -> None:
    series = torch.randn(2 * WEEK, N, generator=torch.Generator().manual_seed(0))
    observed = torch.ones(series.shape, dtype=torch.bool)
    net, inputs = trained(series, observed), batch(series, observed)
    counts, forecast = net.counts.clone(), net(**inputs)
    assert torch.equal(net.counts, counts)
    net.train()(**inputs)
    torch.testing.assert_close(net.counts, 2 * counts)
    torch.testing.assert_close(net.eval()(**inputs), forecast)


def test_where_nothing_was_read_the_sensors_mean_stands_in() -> None:
    series = torch.tensor([[1.0, 5.0]]).repeat(DAY, 1)
    series[-1] = torch.tensor([3.0, 5.0])
    observed = torch.tensor([[True, False]]).expand(DAY, N)
    net = trained(series, observed)
    inputs = batch(series, observed)
    forecast = net(**inputs)[-1]  # the steps after the last that was ever read
    torch.testing.assert_close(forecast, torch.tensor([[5 / 3, 0.0]]).expand(P, N))
