"""Tests for a rise in a noisy series that assume neither a distribution nor independence.

Sources: the rank test for trend of H. B. Mann, Econometrica 13 (1945) 245-259, and M. G. Kendall,
Rank Correlation Methods (1948); the slope of P. K. Sen, J. Am. Stat. Assoc. 63 (1968) 1379-1389;
the effective number of independent readings of G. V. Bayley and J. M. Hammersley, Suppl. J. R.
Stat. Soc. 8 (1946) 184-197; the bias of an estimated autocorrelation, M. G. Kendall, Biometrika 41
(1954) 403-404. SciPy is imported where it is used: it takes half a second.
"""

from __future__ import annotations

from math import isnan, sqrt

import numpy as np
from numpy.typing import NDArray

SMOOTH = 0.05
"""Scatter about a parabola, as a part of the range, below which there is no noise to speak of."""
BIAS = 10.0
"""How much more than 3 readings' worth the parabola takes off a high autocorrelation; set by
simulation so that noise with one of 0.95 raises no alarm, as `test_trend.py` shows."""
Array = NDArray[np.float64]
EXACT_UP_TO = 10
"""Readings up to which the rank test is exact and neighbours are taken to be independent."""


def sen_slope(x: Array, y: Array) -> float:
    """Return the median slope over all pairs; one reading in four may be anything."""
    across = x[:, np.newaxis] - x
    later = across > 0
    if not later.any():
        return 0.0
    return float(np.median((y[:, np.newaxis] - y)[later] / across[later]))


def rising_probability(x: Array, y: Array) -> float:
    """Return the chance that a series without trend would rise as clearly as this one.

    Args:
        x: steps [n], increasing.
        y: readings [n] at those steps.

    Returns:
        The one-sided p value of the rank test, with the readings counted as fewer where
        neighbours resemble each other; 1 for fewer than 3 readings.

    """
    n = len(y)
    if n < 3 or np.ptp(y) == 0:
        return 1.0
    from scipy.stats import kendalltau, norm, t

    exact = n <= EXACT_UP_TO and len(np.unique(y)) == n
    method = "exact" if exact else "asymptotic"
    p_value = float(kendalltau(np.arange(n), y, method=method, alternative="greater").pvalue)
    if isnan(p_value):  # some reading is no number
        return 1.0
    if exact:
        return p_value
    count = effective_count(x, y)
    # Few independent readings: the variance itself is uncertain.
    return float(t.sf(norm.isf(p_value) * sqrt(count / n), 2 * count))


def effective_count(x: Array, y: Array) -> float:
    """Return how many independent readings these are worth, from 2 to n.

    A parabola is taken off first, so that a trend, or one that accelerates, is not mistaken for
    resemblance between neighbours.
    """
    n = len(y)
    if n <= EXACT_UP_TO:
        return float(n)
    rest = y - parabola(x, y)[1]
    power = float((rest**2).mean())
    if sqrt(power) <= SMOOTH * float(np.ptp(y)):
        return float(n)
    estimate = float((rest[1:] * rest[:-1]).mean()) / power
    r = min(max(estimate + (3 + BIAS * max(estimate, 0.0)) / n, 0.0), 0.98)
    return max(n * (1 - r) / (1 + r), 2.0)


def parabola(x: Array, y: Array) -> tuple[float, Array]:
    """Fit ``a + b x + c x^2``; return the t value of c and the fitted values."""
    scaled = (x - x.mean()) / (float(np.ptp(x)) or 1.0)
    terms = np.stack([np.ones_like(scaled), scaled, scaled**2], axis=1)
    coefficients, *_ = np.linalg.lstsq(terms, y, rcond=None)
    fitted = terms @ coefficients
    freedom = len(y) - 3
    if freedom < 1:
        return 0.0, fitted
    # A floor on the error: figures in a log are rounded.
    error = max(float(((y - fitted) ** 2).sum()) / freedom, (1e-4 * float(np.ptp(y))) ** 2)
    spread = error * float(np.linalg.pinv(terms.T @ terms)[2, 2])
    return (float(coefficients[2]) / sqrt(spread) if spread > 0 else 0.0), fitted
