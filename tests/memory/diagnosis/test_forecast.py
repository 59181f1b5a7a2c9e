from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from expt.memory.diagnosis.forecast import forecast
from expt.memory.diagnosis.trend import Reading

GB = 10**9


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
