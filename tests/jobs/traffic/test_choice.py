"""Files that hold several series: which is read, how another is, and the line that says so."""

import h5py
import numpy as np
import pytest

from expt.errors import DataError
from expt.jobs.traffic.choice import Choice, speed_rank
from expt.jobs.traffic.reading import read_series

TIMES = np.datetime64("2018-01-01T00:00", "s") + 300 * np.arange(6)
SPEED = np.arange(60, 72.0).reshape(6, 2)
FLOW, OCCUPANCY = 4 * SPEED, SPEED / 1000
CHANNELS = np.stack([FLOW, OCCUPANCY, SPEED], axis=-1)


def npz(folder, **arrays):
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def hdf5(folder, **arrays):
    with h5py.File(folder / "x.h5", "w") as file:
        for name, array in arrays.items():
            is_time = array.dtype.kind == "M"
            file[name] = np.datetime_as_string(array).astype("S") if is_time else array
    return folder / "x.h5"


@pytest.mark.parametrize("write", [npz, hdf5])
@pytest.mark.parametrize("name", ["speed", "avg_speed", "Velocity", "values"])
def test_speed_is_preferred_and_the_others_are_named(tmp_path, write, name):
    given = {"flow": FLOW, "a_speed_limit": FLOW, name: SPEED, "timestamps": TIMES}
    series = read_series(write(tmp_path, **given, lanes=np.ones(2)))
    np.testing.assert_array_equal(series.values, SPEED)
    (note,) = series.notes
    assert f"{name}, left " in note and "flow" in note and "data.key" in note
    assert "lanes" not in note  # it is no series


@pytest.mark.parametrize("write", [npz, hdf5])
def test_another_is_read_by_its_name(tmp_path, write):
    path = write(tmp_path, flow=FLOW, speed=SPEED, timestamps=TIMES)
    series = read_series(path, choice=Choice(key="flow"))
    np.testing.assert_array_equal(series.values, FLOW)
    assert "flow, left" in series.notes[0] and "speed" in series.notes[0]
    with pytest.raises(DataError, match=r"data.key=x: there is no such .*found .*flow.* speed"):
        read_series(path, choice=Choice(key="x"))


@pytest.mark.parametrize("write", [npz, hdf5])
def test_channels_are_numbered_and_what_they_hold_is_said(tmp_path, write):
    path = write(tmp_path, data=CHANNELS, timestamps=TIMES)
    first, third = read_series(path), read_series(path, choice=Choice(channel=2))
    np.testing.assert_array_equal(first.values, FLOW)
    np.testing.assert_array_equal(third.values, SPEED)
    for channel, series in {0: first, 2: third}.items():
        assert f"read channel {channel} of " in series.notes[0]
        assert "0: 262, 1: 0.0655, 2: 65.5; data.channel" in series.notes[0]
    with pytest.raises(DataError, match=r"data.channel=3: .*data has the channels 0 to 2"):
        read_series(path, choice=Choice(channel=3))


@pytest.mark.parametrize("write", [npz, hdf5])
def test_an_array_without_times_needs_their_beginning_and_step(tmp_path, write):
    path = write(tmp_path, data=CHANNELS)
    with pytest.raises(DataError, match=r"no timestamps; .*data.start=.* data.step_minutes="):
        read_series(path)
    given = Choice(channel=2, start="2018-01-01", step_minutes=5)
    series = read_series(path, choice=given)
    np.testing.assert_array_equal(series.timestamps, TIMES)
    np.testing.assert_array_equal(series.values, SPEED)
    with pytest.raises(DataError, match="given together"):
        read_series(path, choice=Choice(start="2018-01-01"))


def test_times_of_its_own_are_not_overruled(tmp_path):
    path = npz(tmp_path, data=SPEED, timestamps=TIMES)
    with pytest.raises(DataError, match=r"times of its own; leave out data.start"):
        read_series(path, choice=Choice(start="2018-01-01", step_minutes=5))


def test_a_column_is_read_by_its_name(tmp_path):
    path = tmp_path / "x.csv"
    rows = [f"{time},{a},road {b}" for time, (a, b) in zip(TIMES, SPEED, strict=True)]
    path.write_text("\n".join(["time,400001,name of road", *rows]))
    series = read_series(path, choice=Choice(channel=400001))
    np.testing.assert_array_equal(series.values, SPEED[:, :1])
    assert series.notes == ("read column 400001 alone, of 2; data.channel names another",)
    with pytest.raises(DataError, match=r"data.key=speed names one array of several"):
        read_series(path, choice=Choice(key="speed"))


def test_a_column_that_is_not_there_is_refused(tmp_path):
    path = npz(tmp_path, speed=SPEED, timestamps=TIMES, sensor_ids=["a", "b"])
    series = read_series(path, choice=Choice(channel="b"))
    assert series.sensor_ids == ("b",)
    with pytest.raises(DataError, match=r"data.channel=c: speed of shape \(6, 2\) has no such"):
        read_series(path, choice=Choice(channel="c"))


def test_names_of_speeds():
    names = ["/2018/speed", "AvgSpeed", "values", "car_speed", "data", "mean_speed_kmh"]
    assert [speed_rank(name) for name in names] == [0, 1, 2, 3, 4, 1]
    others = ["speed_limit", "free_flow_speed", "flow", "max_speed", "std_speed", "speed_count"]
    assert {speed_rank(name) for name in others} == {None}
