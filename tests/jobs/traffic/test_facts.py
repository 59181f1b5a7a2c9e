from __future__ import annotations

import numpy as np
import pytest

from expt.jobs.traffic.series import Series
from expt.jobs.traffic.windows import describe, deviations, interval, is_irregular

START = np.datetime64("2012-03-01T00:00:00", "s")


def series(steps: list[int], silent: int = 0, sensors: int = 6) -> Series:
    values = np.full((len(steps) + 1, sensors), 50.0)
    values[:, :silent] = 0
    return Series.from_arrays(values, START + np.concatenate(([0], np.cumsum(steps))))


def test_a_sound_series_is_one_line() -> None:
    lines = describe(series([3600], sensors=1), {"train": 1, "val": 1, "test": 0}, 2)
    assert lines == (
        "data: 1 sensor, every 1 h, 2 steps, 0.00 % missing; windows: 1 train, 1 val, 0 test"
    )


def test_few_windows_lost_to_missing_rows_are_a_fact_and_many_a_warning() -> None:
    gap = series([300] * 5 + [900] + [300] * 5)
    few = describe(gap, {"train": 95}, 100).splitlines()
    assert few[0].endswith("5 of 100 (5.0 %) lost to gaps") and len(few) == 1
    facts, warning = describe(gap, {"train": 80}, 100).splitlines()
    assert facts.endswith("20 of 100 (20.0 %) lost to gaps")
    assert warning.startswith("data: warning: the most common interval is 5 min, and 1 of 11 diff")
    assert "Rows are missing" in warning
    assert "another data.input_steps other windows are left to test on" in warning


def test_irregular_timestamps_are_always_a_warning() -> None:
    jitter = series([300] * 5 + [301, 299] + [300] * 5)
    assert is_irregular(jitter)
    _, warning = describe(jitter, {"train": 99}, 100).splitlines()
    assert "2 of 12 differences" in warning and "round or resample" in warning


@pytest.mark.parametrize(
    ("silent", "words"),
    [(1, "1 sensor without any reading: 0"), (5, "5 sensors without any reading: 0, 1, 2, …")],
)
def test_silent_sensors_are_named(silent: int, words: str) -> None:
    lines = describe(series([300] * 3, silent), {"train": 1}, 1).splitlines()
    assert lines[1:] == [f"data: warning: {words}"]


def test_regular_timestamps_deviate_in_nothing() -> None:
    assert deviations(series([300] * 3)) == ""
    assert not is_irregular(series([300, 300, 900]))


def test_words() -> None:
    assert [interval(seconds) for seconds in (300, 3600, 297)] == ["5 min", "1 h", "297 s"]
