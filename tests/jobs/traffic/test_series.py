"""Against the shipped METR-LA file, whose figures are in the data sets' README."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import expt.jobs.traffic.series as module
from expt.errors import DataError
from expt.jobs.traffic.series import Series

FILES = Path(module.__file__).parent / "files"
START = np.datetime64("2012-03-01T00:00:00")


def times(count, step=300):
    return START + np.arange(count) * np.timedelta64(step, "s")


def small(**changes):
    arrays = {
        "values": np.array([[60.0, 61.0], [62.0, 0.0], [64.0, 65.0]]),
        "timestamps": times(3),
        "sensor_ids": ["a", "b"],
    }
    return Series.from_arrays(**{**arrays, **changes})


@pytest.fixture(scope="module")
def metr_la():
    with np.load(FILES / "metr_la_29.npz") as file:
        return Series.from_arrays(
            file["speed"],
            file["timestamps"],
            file["sensor_ids"],
            file["adjacency"],
            file["locations"],
        )


def test_the_shipped_series_has_the_published_figures(metr_la):
    observed = metr_la.values[metr_la.values > 0]
    assert metr_la.values.shape == (34272, 29)
    assert metr_la.values.dtype == np.float32
    assert observed.mean(dtype=np.float64) == pytest.approx(54.43, abs=0.005)
    assert (metr_la.values == 0).mean() == pytest.approx(0.0775, abs=0.00005)
    assert metr_la.timestamps[0] == START
    assert metr_la.timestamps[-1] == np.datetime64("2012-06-27T23:55:00")
    assert metr_la.timestamps.dtype == np.dtype("datetime64[s]")
    assert np.count_nonzero(metr_la.adjacency) == 181
    assert metr_la.sensor_ids[0] == "773869"
    assert metr_la.locations.shape == (29, 2)
    assert (metr_la.step_seconds, metr_la.steps_per_day) == (300, 288)


def test_missing_values_become_zero_and_types_are_converted():
    series = small(values=[[60, np.nan], [61, 62], [0, 63]], sensor_ids=[b"773869", 767541])
    np.testing.assert_array_equal(series.values, np.float32([[60, 0], [61, 62], [0, 63]]))
    assert series.values.dtype == np.float32
    assert series.sensor_ids == ("773869", "767541")


def test_sensors_without_ids_are_numbered():
    assert small(sensor_ids=None).sensor_ids == ("0", "1")


def test_the_step_is_the_most_common_difference():
    uneven = START + np.array([0, 600, 900, 1500, 2100, 3600]).astype("timedelta64[s]")
    series = small(values=np.ones((6, 2)), timestamps=uneven)
    assert (series.step_seconds, series.steps_per_day) == (600, 144)


def test_a_step_that_does_not_divide_the_day_is_refused():
    series = small(timestamps=times(3, step=420))
    with pytest.raises(DataError, match=r"420 seconds does not divide the day"):
        _ = series.steps_per_day


REPEATED = times(3)[[0, 1, 1]]
SWAPPED = times(3)[[1, 0, 2]]
NO_TIME = np.array([START, "NaT", START + 600], dtype="datetime64[s]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.ones(3)}, r"shape \(3,\); expected two axes"),
        ({"values": np.ones((3, 0)), "sensor_ids": []}, "no sensor"),
        ({"values": np.ones((3, 5))}, "5 columns of speeds but 2 sensor ids"),
        ({"values": np.ones((4, 2))}, r"4 rows of speeds but timestamps of shape \(3,\)"),
        ({"values": np.ones((1, 2)), "timestamps": times(1)}, "1 time steps; expected at least 2"),
        ({"values": [["60", "x"]] * 3}, "the speeds are not numbers but"),
        ({"sensor_ids": ["a", "a"]}, "repeated sensor ids: 'a'"),
        ({"locations": np.ones((2, 3))}, r"locations of shape \(2, 3\); expected \(2, 2\)"),
        ({"timestamps": NO_TIME}, "timestamp of row 1 is empty"),
        (
            {"timestamps": REPEATED},
            "time steps not increasing: row 2 .*2012-03-01T00:05:00.*2012-03-01T00:05:00",
        ),
        (
            {"timestamps": SWAPPED},
            "time steps not increasing: row 1 .*2012-03-01T00:00:00.*2012-03-01T00:05:00",
        ),
        ({"values": [[1, 2], [3, np.inf], [5, 6]]}, "not finite, the first inf at sensor b, 2012"),
        ({"values": [[1, 2], [3, 1e39], [5, 6]]}, "not finite"),
        ({"values": [[1, 2], [3, 4], [-5, -6]]}, "2 speeds are negative, the first -5.0 at .* a"),
        ({"values": np.zeros((3, 2))}, "all values are missing"),
        ({"values": np.full((3, 2), np.nan)}, "all values are missing"),
        ({"adjacency": np.eye(3)}, "wrong sensor count .* has 2 sensors, the adjacency 3 sensors"),
        ({"adjacency": np.ones(2)}, r"wrong sensor count .* shape \(2,\)"),
        ({"adjacency": [[1, np.nan], [0, 1]]}, "adjacency has entries that are not finite"),
    ],
)
def test_unsound_arrays_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        small(**changes)


def test_a_graph_in_another_order_is_reordered():
    series = small().with_adjacency(np.float32([[1, 2], [3, 4]]), ("b", "a"))
    np.testing.assert_array_equal(series.adjacency, [[4, 3], [2, 1]])


def test_of_a_larger_graph_its_own_sensors_are_taken():
    series = small().with_adjacency(np.arange(9, dtype=np.float32).reshape(3, 3), ("b", "c", "a"))
    np.testing.assert_array_equal(series.adjacency, [[8, 6], [2, 0]])
    assert series.notes == ("left 1 of the graph's 3 sensors, of no reading",)


def test_a_graph_without_ids_is_kept_as_it_is():
    series = small().with_adjacency(np.float32([[1, 2], [3, 4]]))
    np.testing.assert_array_equal(series.adjacency, [[1, 2], [3, 4]])


def test_a_shuffled_graph_of_the_shipped_series_comes_back(metr_la):
    order = np.random.default_rng(0).permutation(29)
    shuffled = metr_la.adjacency[np.ix_(order, order)]
    ids = [metr_la.sensor_ids[row] for row in order]
    series = metr_la.with_adjacency(shuffled, ids)
    assert not np.array_equal(shuffled, metr_la.adjacency)
    np.testing.assert_array_equal(series.adjacency, metr_la.adjacency)


def test_a_graph_of_other_sensors_is_refused():
    with pytest.raises(DataError, match=r"graph lacks 1 of the series' 2 sensors: 'b'; it has 'a'"):
        small().with_adjacency(np.eye(2, dtype=np.float32), ("a", "c"))


def test_a_graph_of_another_size_is_refused(metr_la):
    with pytest.raises(DataError, match="series has 29 sensors, the adjacency 207 sensors"):
        metr_la.with_adjacency(np.eye(207, dtype=np.float32))


def test_the_fingerprint_follows_values_times_and_ids_only():
    prints = [
        small().fingerprint(),
        small(values=np.array([[60.0, 61.0], [62.0, 0.0], [64.0, 65.5]])).fingerprint(),
        small(timestamps=times(3) + np.timedelta64(60, "s")).fingerprint(),
        small(sensor_ids=["a", "c"]).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)
    assert small(adjacency=np.eye(2)).fingerprint() == prints[0]


def test_importing_the_readers_loads_no_heavy_library():
    code = (
        "import sys, expt.jobs.traffic.series, expt.jobs.traffic.reading; "
        "print([m for m in ('torch', 'pandas', 'h5py', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
