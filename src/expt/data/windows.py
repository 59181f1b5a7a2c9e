"""Windows of a series: where each begins, none across a gap, and which split it belongs to.

Letters: `W` windows.
"""

from __future__ import annotations

import numpy as np

from expt.data.series import Series
from expt.errors import DataError
from expt.protocols import Split
from expt.units import counted


def window_starts(series: Series, length: int) -> np.ndarray:
    """Return the first step of every run of `length` steps without a gap, int64 [W]."""
    if len(series.timestamps) < length:
        return np.empty(0, dtype=np.int64)
    seconds = series.timestamps.astype(np.int64)
    starts = np.arange(len(seconds) - length + 1, dtype=np.int64)
    span = (length - 1) * series.step_seconds
    irregular = np.concatenate(([0], np.cumsum(np.diff(seconds) != series.step_seconds)))
    whole = seconds[starts + length - 1] - seconds[starts] == span
    unbroken: np.ndarray = starts[whole & (irregular[starts + length - 1] == irregular[starts])]
    return unbroken


def split_windows(
    starts: np.ndarray,
    train_fraction: float,
    test_fraction: float,
    path: str | None,
    deviations: str = "",
) -> dict[Split, np.ndarray]:
    """Cut the windows [W] in time order; sizes are rounded as in the published code.

    Raises `DataError` when a split would be empty; `deviations` says what the gaps are, if any.
    """
    num_train = round(len(starts) * train_fraction)
    num_test = round(len(starts) * test_fraction)
    num_val = len(starts) - num_train - num_test
    if min(num_train, num_val, num_test) < 1:
        longer = "a longer series, or smaller data.input_steps and data.horizon, would do"
        remedy = deviations or longer
        raise DataError(
            f"{path}: only {counted(len(starts), 'window')} without a gap, which leaves "
            f"{num_train} for training, {num_val} for validation, {num_test} for the test; {remedy}"
        )
    return {
        "train": starts[:num_train],
        "val": starts[num_train : num_train + num_val],
        "test": starts[num_train + num_val :],
    }
