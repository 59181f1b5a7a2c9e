from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from expt.memory.diagnosis import statistics
from expt.memory.diagnosis.statistics import (
    effective_count,
    parabola,
    rising_probability,
    sen_slope,
)


def test_the_exact_probability_counts_permutations() -> None:
    x = np.arange(6.0)
    series = np.array([0.0, 2.0, 1.0, 3.0, 5.0, 4.0])

    def score(values: tuple[float, ...]) -> int:
        return sum(int(np.sign(b - a)) for i, a in enumerate(values) for b in values[i + 1 :])

    own = score(tuple(series))
    orders = list(permutations(range(6)))
    expected = sum(score(order) >= own for order in orders) / len(orders)
    assert rising_probability(x, series) == pytest.approx(expected)
    assert rising_probability(x, np.arange(6.0)) == pytest.approx(1 / 720)
    assert rising_probability(x, -np.arange(6.0)) == pytest.approx(1)


def test_the_normal_curve_takes_over_from_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rng = np.arange(10.0), np.random.default_rng(0)
    rising = [rng.normal(size=10) + 0.3 * x for _ in range(30)]
    exact = np.array([rising_probability(x, y) for y in rising])
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 5)
    monkeypatch.setattr(statistics, "effective_count", lambda x, y: float(len(y)))
    normal = np.array([rising_probability(x, y) for y in rising])
    assert np.abs(normal - exact).max() < 0.05
    assert (normal != exact).all()


def test_p_values_of_white_noise_are_uniform() -> None:
    x = np.arange(60.0)
    rng = np.random.default_rng(1)
    values = np.array([rising_probability(x, rng.normal(size=60)) for _ in range(400)])
    for level in (0.1, 0.5):
        assert (values < level).mean() <= level + 0.05
    assert values.min() > 1e-4


def test_a_constant_series_does_not_rise() -> None:
    assert rising_probability(np.arange(20.0), np.full(20, 7.0)) == 1
    assert rising_probability(np.arange(2.0), np.arange(2.0)) == 1


def test_the_slope_is_scipys_also_where_steps_or_readings_repeat() -> None:
    from scipy.stats import theilslopes

    rng = np.random.default_rng(2)
    for n in (2, 3, 17, 40):
        for x in (np.arange(float(n)), np.arange(float(n)) // 2):
            if np.ptp(x) == 0:
                continue
            for y in (rng.normal(size=n) * 1e9, rng.integers(0, 20, n) * 1.0):
                assert sen_slope(x, y) == theilslopes(y, x).slope
    assert sen_slope(np.zeros(5), np.arange(5.0)) == 0


def test_the_slope_ignores_a_few_wild_readings() -> None:
    x = np.arange(50.0)
    y = 3 * x + 5
    y[::7] += 1000
    assert sen_slope(x, y) == pytest.approx(3, abs=1)
    assert sen_slope(np.zeros(3), np.arange(3.0)) == 0


def test_neighbours_that_resemble_each_other_count_for_less() -> None:
    rng = np.random.default_rng(2)
    x = np.arange(200.0)
    noise = rng.normal(size=200)
    walk = np.convolve(noise, np.ones(20), "same")
    assert effective_count(x, noise) > 100
    assert effective_count(x, walk) < 20
    assert effective_count(x, x**2) == 200, "a trend is no resemblance"


def test_the_parabola_finds_a_bend() -> None:
    x = np.arange(30.0)
    noise = np.random.default_rng(3).normal(size=30)
    assert abs(parabola(x, 5 * x + noise)[0]) < 3
    bend, fitted = parabola(x, x**2 + noise)
    assert bend > 20
    assert np.abs(fitted - x**2).max() < 2
