from __future__ import annotations

import numpy as np
import pytest

from expt.jobs.traffic.scale import scale_warnings
from expt.jobs.traffic.series import Series

START = np.datetime64("2017-01-01", "s")
DRAW = np.random.default_rng(0)


def series(**columns: float) -> Series:
    """A column around each of these figures."""
    values = [np.full(200, typical) * DRAW.uniform(0.9, 1.1, 200) for typical in columns.values()]
    times = START + 300 * np.arange(200)
    return Series.from_arrays(np.stack(values, axis=1), times, columns)


@pytest.mark.parametrize(
    ("columns", "unit"),
    [
        ({"a": 60, "b": 12, "c": 68, "d": 45}, "mph"),
        ({"a": 130, "b": 20, "c": 0}, "km/h"),
        ({"a": 220, "b": 900, "c": 140}, "vehicles/h"),
        ({"a": 203, "b": 9, "c": 182, "d": 173}, "veh/5min"),
        ({"id_1": 60, "id_2": 61}, "mph"),
        ({"avg_speed_lane_1": 60, "b": 61}, "mph"),
    ],
)
def test_speeds_that_differ_as_speeds_do_are_not_warned_of(columns, unit):
    assert scale_warnings(series(**columns), unit) == []


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"total_flow": 220, "avg_occupancy": 0.06, "avg_speed": 60}, "total_flow avg_occupancy"),
        ({"s1": 60, "s2": 400001}, "s2"),
        ({"x": 400001, "y": 400002, "z": 60}, "x y"),
        ({"x": 0.05, "y": 0.08, "z": 0.06, "v": 60, "w": 61, "u": 55}, ""),
        ({"a": 60, "b": 61, "laneCount": 40, "lat": 37.1}, "laneCount lat"),
        ({"a": 60, "flow": 70}, "flow"),
        ({"a": 60, "b": 61, "q": 180}, "q"),
    ],
)
def test_columns_of_another_kind_are_named(columns, named):
    (warning,) = scale_warnings(series(**columns), "mph")
    assert "of another kind" in warning and "data.channel=NAME" in warning
    names = warning.partition("others: ")[2].partition("; typical")[0]
    if named:
        assert [part.split()[0] for part in names.split("), ")] == named.split()


def test_speeds_too_large_for_the_unit_are_warned_of():
    (warning,) = scale_warnings(series(a=210, b=230), "mph")
    assert "a typical reading is 2" in warning and "data.unit" in warning
    odd = series(a=60, b=60)
    odd.values[3, 1] = 65535
    (warning,) = scale_warnings(odd, "mph")
    assert warning.startswith("readings above 500 mph: b (up to 6.55e+04)")


def test_many_columns_are_not_all_listed():
    columns = {f"s{n}": 60.0 for n in range(20)} | {f"flow{n}": 900.0 for n in range(9)}
    (warning,) = scale_warnings(series(**columns), "mph")
    assert warning.startswith("9 columns of another kind") and "flow5 (" in warning
    assert ", …" in warning and "flow6" not in warning
