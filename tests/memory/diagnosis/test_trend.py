from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from expt.memory.diagnosis.trend import MOST_READINGS, Reading, forecast, judge

GB = 10**9
HANDBOOK = (18.2, 18.6, 19.0, 19.5, 20.1, 20.8, 21.7, 22.8, 24.2)  # the ends are the handbook's


def log(values: object, every: int = 10, **more: object) -> list[Reading]:
    """Readings from GB values, a step every so many."""
    return [
        Reading(float((at + 1) * every), round(float(value) * GB), **more)  # type: ignore[arg-type]
        for at, value in enumerate(np.asarray(values, dtype=float))
    ]


def resembling(rng: np.random.Generator, count: int, correlation: float) -> np.ndarray:
    """Autoregressive noise of unit variance [count]."""
    noise = rng.normal(size=count)
    for at in range(1, count):
        noise[at] = correlation * noise[at - 1] + (1 - correlation**2) ** 0.5 * noise[at]
    return noise


def test_the_handbooks_log_is_an_accelerating_leak() -> None:
    trend = judge(log(HANDBOOK, 100), ran_out=True)
    assert (trend.verdict, trend.accelerating) == ("leak", True)
    assert (trend.first_step, trend.last_step) == (100, 900)
    assert trend.growth_bytes == pytest.approx(6 * GB, rel=0.15)
    assert trend.growth_bytes_per_step == pytest.approx(6 * GB / 800, rel=0.15)
    assert trend.p_value < 1e-5
    assert judge(log(HANDBOOK, 100)).verdict == "leak", "also before it ran out"


@pytest.mark.parametrize("kept", [(0, 8), (0, 4, 8), (0, 2, 5, 8), (0, 2, 4, 6, 8)])
def test_a_few_lines_of_it_are_enough_when_memory_ran_out(kept: tuple[int, ...]) -> None:
    readings = log(HANDBOOK, 100)
    trend = judge([readings[at] for at in kept], ran_out=True)
    assert trend.verdict == "leak"
    assert trend.accelerating == (len(kept) > 2)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize(("count", "deviation"), [(9, 0.3), (30, 0.3), (100, 0.3), (100, 1.5)])
def test_noise_raises_no_alarm(correlation: float, count: int, deviation: float) -> None:
    verdicts = set()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        noise, others = (deviation * resembling(rng, count, correlation) for _ in range(2))
        readings = [
            replace(
                reading,
                reserved_bytes=round(reading.allocated_bytes * 1.4 + abs(rng.normal()) * GB / 5),
                other_bytes=round((2 + other / 4) * GB),
            )
            for reading, other in zip(log(18 + noise), others, strict=True)
        ]
        verdicts.add(judge(readings).verdict)
    assert verdicts == {"steady"}


def test_strongly_correlated_noise_raises_hardly_any_alarm() -> None:
    alarms = [
        judge(log(18 + 0.3 * resembling(np.random.default_rng(seed), 100, 0.9))).verdict != "steady"
        for seed in range(100)
    ]
    assert sum(alarms) <= 1


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "verdict"),
    [
        (lambda x: 18 + 0.02 * x, "leak"),
        (lambda x: 18 + 0.3 * np.floor(x / 10), "leak"),  # a cache that grows once an epoch
        (lambda x: 18 + 0.2 * np.exp(x / 30), "leak"),
        (lambda x: 18 + 0.03 * x + 0.2 * (x % 10), "leak"),
        (lambda x: 18 + 4 * (1 - np.exp(-x / 8)), "steady"),  # warming up
        (lambda x: 18 + 4 * (1 - np.exp(-x / 20)), "steady"),
        (lambda x: 18 + 2.0 * (x > 30), "steady"),  # optimizer state, a larger evaluation batch
        (lambda x: 18 + 2.0 * (x > 70), "steady"),
        (lambda x: 24 - 0.03 * x, "steady"),
        (lambda x: 0 * x + 18, "steady"),
        (lambda x: 18 + 0.001 * x, "steady"),  # half a percent: nobody needs to be woken
    ],
)
def test_shapes(shape: object, verdict: str, noise: float) -> None:
    x = np.arange(100.0)
    rng = np.random.default_rng(4)
    values = shape(x) + noise * rng.normal(size=100)  # type: ignore[operator]
    assert judge(log(values)).verdict == verdict


def test_acceleration_is_not_seen_in_even_growth() -> None:
    x = np.arange(100.0)
    for seed in range(30):
        noise = 0.1 * np.random.default_rng(seed).normal(size=100)
        assert not judge(log(18 + 0.05 * x + noise)).accelerating
        assert judge(log(18 + 0.0005 * x**2 + noise)).accelerating


def test_what_is_reserved_without_a_tensor_grows() -> None:
    readings = [
        replace(reading, reserved_bytes=round((11 + 0.06 * at) * GB))
        for at, reading in enumerate(log(10 + 0.1 * np.random.default_rng(5).normal(size=100)))
    ]
    trend = judge(readings)
    assert trend.verdict == "fragmentation"
    assert not trend.accelerating
    assert "reserved but unallocated" in trend.evidence[0]
    small = [
        replace(r, reserved_bytes=r.allocated_bytes + 10**7 * at) for at, r in enumerate(readings)
    ]
    assert judge(small).verdict == "steady", "a tenth of what is reserved is no fragmentation"


@pytest.mark.parametrize("arrives", [lambda at: 0.05 * at, lambda at: 6.0 * (at > 60)])
def test_somebody_else_takes_the_device(arrives: object) -> None:
    readings = [
        replace(reading, other_bytes=round((1 + arrives(at)) * GB))  # type: ignore[operator]
        for at, reading in enumerate(log(10 + 0.1 * np.random.default_rng(6).normal(size=100)))
    ]
    assert judge(readings).verdict == "other_process"


def test_the_highest_so_far_of_noise_is_no_leak() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        records = np.maximum.accumulate(18 + 3 * rng.normal(size=20))
        assert judge(log(records, high_water=True)).verdict == "steady"
    growing = np.maximum.accumulate(18 + 0.1 * np.arange(60) + 0.02 * rng.normal(size=60))
    assert judge(log(growing, high_water=True)).verdict == "leak"


def test_too_few_readings_say_nothing() -> None:
    assert judge([]).verdict == "steady"
    assert judge([], ran_out=True).verdict == "steady"
    assert judge(log([18.2])).verdict == "steady"
    assert judge(log([18.2, 20, 24])).verdict == "steady"
    assert judge(log([18.2, 18.2, 18.2]), ran_out=True).verdict == "steady"


def test_a_long_log_is_put_together() -> None:
    x = np.arange(20 * MOST_READINGS, dtype=float)
    noise = np.random.default_rng(8).normal(size=len(x))
    assert judge(log(18 + noise)).verdict == "steady"
    assert judge(log(18 + noise + x / 3000)).verdict == "leak"


def line(start: float, slope: float, count: int = 20, noise: float = 0.0) -> list[Reading]:
    """Readings at steps 0, 10, 20, …, in GB and GB a step."""
    rng = np.random.default_rng(0)
    return [
        Reading(10.0 * at, round((start + slope * 10 * at + noise * rng.normal()) * GB))
        for at in range(count)
    ]


def test_the_line_is_continued() -> None:
    ahead = forecast(line(10, 0.01), 24 * GB, horizon_steps=100)
    assert ahead is not None
    assert ahead.expected_bytes == pytest.approx(12.9 * GB, rel=1e-6)
    assert ahead.steps_left == pytest.approx((24 - 11.9) / 0.01, rel=1e-6)
    assert (ahead.risk, ahead.action) == (pytest.approx(0, abs=1e-6), "none")


def test_what_others_hold_is_no_room() -> None:
    readings = [replace(one, other_bytes=10 * GB) for one in line(10, 0.01)]
    ahead = forecast(readings, 24 * GB, horizon_steps=300)
    assert ahead is not None
    assert ahead.steps_left == pytest.approx((14 - 11.9) / 0.01, rel=1e-6)
    assert ahead.risk > 0.9


@pytest.mark.parametrize(
    ("capacity", "action"),
    [
        (12.0, "halve_batch_and_checkpoint"),
        (12.88, "mixed_precision"),
        (12.855, "smaller_batch"),
        (14.0, "none"),
    ],
)
def test_the_action_follows_the_risk(capacity: float, action: str) -> None:
    ahead = forecast(line(10, 0.01, noise=0.05), round(capacity * GB), horizon_steps=100)
    assert ahead is not None
    limits = {"halve_batch_and_checkpoint": (0.8, 1), "smaller_batch": (0.5, 0.8)}
    low, high = limits.get(action, (0.3, 0.5) if action == "mixed_precision" else (0, 0.3))
    assert low <= ahead.risk <= high
    assert ahead.action == action
    assert ahead.advice


def test_more_noise_makes_a_near_limit_more_and_a_passed_one_less_certain() -> None:
    calm, wild = (forecast(line(10, 0, noise=n), round(10.5 * GB)) for n in (0.05, 0.5))
    assert calm is not None
    assert wild is not None
    assert calm.risk < 0.01 < wild.risk < 0.5


def test_what_a_step_needs_in_between_is_taken_off() -> None:
    readings = line(10, 0)
    with_peaks = [replace(reading, peak_bytes=15 * GB) for reading in readings]
    alone, beside = (forecast(one, 14 * GB) for one in (readings, with_peaks))
    assert alone is not None
    assert beside is not None
    assert alone.risk < 0.01
    assert beside.risk > 0.99


def test_only_the_window_counts() -> None:
    readings = line(10, 0.05, 40) + [Reading(400.0 + 10 * at, 30 * GB) for at in range(50)]
    ahead = forecast(readings, 40 * GB)
    assert ahead is not None
    assert ahead.steps_left is None
    assert ahead.risk < 0.01


def test_too_few_readings() -> None:
    assert forecast(line(10, 0.01, 3), 24 * GB) is None
    assert forecast([Reading(5, GB)] * 6, 24 * GB) is not None, "the same step again and again"
