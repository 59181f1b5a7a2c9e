"""Letters: `B` batch, `P` horizon, `N` sensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from expt.job import Batch
from expt.jobs.traffic.metrics import MaskedErrors, day_periods, reported_steps

MEAN, STD = 54.0, 15.0


def to_speed(prediction: Tensor) -> Tensor:
    return prediction.float() * STD + MEAN


def batches(sizes: tuple[int, ...] = (64, 64, 3), horizon: int = 12) -> list[tuple[Tensor, Batch]]:
    """Draw uneven batches in which the part of missing targets differs widely."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for number, size in enumerate(sizes):
        target = 5 + 65 * torch.rand(size, horizon, 7, generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.3 * number] = 0
        prediction = torch.randn(target.shape, generator=generator) * (1 + number)
        drawn.append((prediction, Batch({}, target)))
    return drawn


def brute_force(drawn: list[tuple[Tensor, Batch]]) -> dict[str, float]:
    prediction = np.concatenate([p.double().numpy() * STD + MEAN for p, _ in drawn])
    target = np.concatenate([batch.target.double().numpy() for _, batch in drawn])
    observed = target > 0
    error = np.abs(prediction - target)
    expected = {
        "mae": error[observed].mean(),
        "rmse": np.sqrt(np.square(error[observed]).mean()),
        "mape": (error[observed] / target[observed]).mean(),
    }
    for step in (2, 5, 11):
        expected[f"mae_{5 * (step + 1)}min"] = error[:, step][observed[:, step]].mean()
    return expected


def added(
    drawn: list[tuple[Tensor, Batch]],
    horizon: int = 12,
    step_seconds: int = 300,
    begins: Sequence[int] = (0,),
) -> MaskedErrors:
    metrics = MaskedErrors(to_speed, horizon, step_seconds, begins)
    for prediction, batch in drawn:
        metrics.update(prediction, batch)
    return metrics


def test_the_figures_are_those_of_a_brute_force_sum() -> None:
    drawn = batches()
    assert added(drawn).compute() == pytest.approx(brute_force(drawn), rel=1e-6)


def test_how_the_split_is_cut_into_batches_does_not_matter() -> None:
    drawn = batches()
    prediction = torch.cat([p for p, _ in drawn])
    target = torch.cat([batch.target for _, batch in drawn])
    whole = added([(prediction, Batch({}, target))]).compute()
    assert added(drawn).compute() == pytest.approx(whole, rel=1e-9)


def test_a_mean_of_per_batch_means_would_differ() -> None:
    drawn = batches()
    means = [added([one]).compute() for one in drawn]
    whole = added(drawn).compute()
    for name in ("mae", "rmse", "mape"):
        flattering = np.mean([figures[name] for figures in means])
        assert abs(flattering - whole[name]) > 0.05 * whole[name]


def test_missing_targets_do_not_count_whatever_is_predicted() -> None:
    prediction = torch.zeros(1, 1, 3)
    target = torch.tensor([[[MEAN + 2, 0.0, MEAN - 4]]])
    figures = added([(prediction, Batch({}, target))], horizon=1).compute()
    assert figures["mae"] == pytest.approx(3)
    assert figures["rmse"] == pytest.approx(np.sqrt(10))
    prediction[0, 0, 1] = float("nan")
    assert added([(prediction, Batch({}, target))], horizon=1).compute() == figures


def test_mae_of_every_step() -> None:
    drawn = batches()
    by_step = added(drawn).by_step()
    expected = brute_force(drawn)
    assert len(by_step) == 12
    for step in (2, 5, 11):
        assert by_step[step] == pytest.approx(expected[f"mae_{5 * (step + 1)}min"], rel=1e-6)


@pytest.mark.parametrize(
    ("horizon", "step_seconds", "minutes"),
    [
        (12, 300, [15, 30, 60]),
        (24, 300, [15, 30, 60]),
        (4, 900, [15, 30, 60]),
        (6, 300, [10, 15, 30]),
        (2, 300, [5, 10]),
        (1, 300, [5]),
        (3, 3600, [60, 120, 180]),
        (12, 3600, [60, 180, 360, 720]),
        (12, 60, [3, 6, 12]),
        (12, 600, [30, 60, 120]),
        (4, 90, [1.5, 3, 6]),
    ],
)
def test_fixed_horizons_and_parts_of_the_whole_where_one_is_not_there(
    horizon: int, step_seconds: int, minutes: list[float]
) -> None:
    figures = added(batches(horizon=horizon), horizon, step_seconds).compute()
    reported = [name for name in figures if name.startswith("mae_")]
    assert reported == [f"mae_{count}min" for count in minutes]
    steps = reported_steps(horizon, step_seconds)
    assert [step * step_seconds for step in steps.values()] == [60 * count for count in minutes]


def test_the_sums_are_not_rounded_to_float32() -> None:
    metrics = MaskedErrors(to_speed, 1, 300)
    target = torch.full((64, 1, 64), MEAN + 0.1)
    for _ in range(30):
        metrics.update(torch.zeros_like(target), Batch({}, target))
    error = float(target[0, 0, 0]) - MEAN
    assert metrics.compute()["mae"] == pytest.approx(error, rel=1e-12)


def test_half_precision_predictions_are_judged_in_float32() -> None:
    target = torch.full((4, 1, 8), MEAN + 0.125)
    figures = added([(torch.zeros(4, 1, 8, dtype=torch.bfloat16), Batch({}, target))], 1).compute()
    assert figures["mae"] == pytest.approx(0.125)


@pytest.mark.parametrize("begins", [[0], [0, 1, 64, 200, 300], [0, 288], [0, 500, 600]])
def test_errors_by_sensor_are_those_of_each_period_whatever_the_batches(begins: list[int]) -> None:
    drawn = batches((200, 64, 190, 64), horizon=2)
    prediction = torch.cat([p for p, _ in drawn]).double() * STD + MEAN
    target = torch.cat([batch.target for _, batch in drawn]).double()
    error = torch.where(target > 0, prediction - target, 0.0)
    found = added(drawn, 2, begins=begins).by_sensor()
    begun = [first for first in begins if first < len(target)]
    assert len(found) == len(begun)
    for sums, first, end in zip(found, begun, [*begun[1:], len(target)], strict=True):
        part, observed = error[first:end], target[first:end] > 0
        torch.testing.assert_close(sums[0], part.abs().sum(dim=(0, 1)), rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(sums[1], part.sum(dim=(0, 1)), rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(sums[2], observed.sum(dim=(0, 1)).double())


@pytest.mark.parametrize(("step", "per_day"), [(300, 288), (900, 96), (3600, 24), (86_400, 1)])
def test_a_period_is_a_day_of_first_forecasts(step: int, per_day: int) -> None:
    noon = np.datetime64("2012-03-01T12:00:00")
    times = noon + np.arange(10 * per_day) * np.timedelta64(step)
    first = max(per_day // 2, 1)
    begins, days = day_periods(times)
    assert days == 1 and begins[:3] == [0, first, first + per_day]
    by_day = times[(times - times.astype("M8[D]")).astype(int) >= 6 * 3600]  # the nights left out
    begins, days = day_periods(by_day)
    assert [str(time)[8:10] for time in by_day[begins]][:3] == ["01", "02", "03"]


@pytest.mark.parametrize(("count", "joined", "periods"), [(60, 1, 60), (61, 2, 31), (365, 7, 53)])
def test_many_days_are_joined_by_whole_numbers(count: int, joined: int, periods: int) -> None:
    times = np.datetime64("2012-03-01T00:00:00") + np.arange(24 * count) * np.timedelta64(3600)
    begins, days = day_periods(times)
    assert days == joined and len(begins) == periods
    assert begins[:2] == [0, 24 * joined]
    assert day_periods(times[:0]) == ([0], 1)


def test_nothing_added_is_an_error() -> None:
    none = MaskedErrors(to_speed, 12, 300)
    for ask in (none.compute, none.by_step, none.by_sensor):
        with pytest.raises(ValueError, match="no batch was added"):
            ask()
