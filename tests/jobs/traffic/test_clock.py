"""Changes of clocks and zones, in files of each kind."""

import datetime
import pickle
import re
import zoneinfo

import h5py
import numpy as np
import pandas as pd
import pytest

from expt.errors import DataError
from expt.jobs.traffic.clock import order_advice, repeated_hour
from expt.jobs.traffic.reading import read_series

AUTUMN = {
    "America/Los_Angeles": ("2017-10-30", "2017-11-05T01:00"),
    "Europe/Berlin": ("2017-10-20", "2017-10-29T02:00"),
    "Australia/Sydney": ("2017-03-28", "2017-04-02T02:00"),
}


def zoned(zone="America/Los_Angeles", step="15min", days=12):
    first = AUTUMN[zone][0]
    return pd.date_range(first, pd.Timestamp(first) + pd.Timedelta(days=days), freq=step, tz=zone)


@pytest.mark.parametrize("zone", AUTUMN)
@pytest.mark.parametrize("step", ["5min", "15min", "30min", "1h"])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_the_repeated_hour_of_autumn_is_known(zone, step, is_sorted):
    times = zoned(zone, step).tz_localize(None).to_numpy().astype("datetime64[s]")
    times = np.sort(times) if is_sorted else times
    assert repeated_hour(times) == np.datetime64(AUTUMN[zone][1])
    assert "standard time" in order_advice(times)


def test_other_faults_are_no_change_of_clocks():
    regular = np.datetime64("2017-11-05T00:00", "s") + 300 * np.arange(288)
    by_day = np.concatenate((regular[:150], regular[138:]))
    repeated = (regular[[0, 1, 1, 2]], regular[[0, 0]])
    for times in (regular[::-1], np.repeat(regular, 2), by_day, *repeated):
        assert repeated_hour(times) is None
    assert order_advice(regular[::-1]) == "sort by time and drop repeated rows"
    assert "long table" in order_advice(np.tile(regular, 3))


def frame(times):
    speeds = np.random.default_rng(0).uniform(20, 70, (len(times), 2))
    return pd.DataFrame(speeds, index=times, columns=["a", "b"]).rename_axis("time")


def as_csv(table, folder):
    table.to_csv(folder / "x.csv")
    return folder / "x.csv"


def as_long_csv(table, folder):
    table.reset_index().melt("time", var_name="sensor").to_csv(folder / "x.csv", index=False)
    return folder / "x.csv"


def as_parquet(table, folder):
    table.to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def as_hdf5(table, folder, zone=None):
    """Write what `frame.to_hdf` writes: UTC and the zone."""
    zone = zone or (None if table.index.tz is None else str(table.index.tz).encode())
    with h5py.File(folder / "x.h5", "w") as file:
        group = file.create_group("df")
        columns = table.columns.to_numpy().astype("S")
        group["axis0"], group["block0_items"] = columns, columns
        group["block0_values"] = table.to_numpy()
        group["axis1"] = table.index.as_unit("ns").asi8
        group["axis1"].attrs["kind"] = np.bytes_("datetime64")
        if zone is not None:
            group["axis1"].attrs["tz"] = np.bytes_(zone)
    return folder / "x.h5"


@pytest.mark.parametrize("write", [as_csv, as_long_csv, as_parquet, as_hdf5])
def test_the_repeated_hour_is_not_to_be_dropped(tmp_path, write):
    times = zoned() if write in (as_parquet, as_hdf5) else zoned().tz_localize(None)
    with pytest.raises(DataError, match=r"2017-11-05T01:00 on occurs twice.*standard time") as e:
        read_series(write(frame(times), tmp_path))
    assert "drop" not in str(e.value)


@pytest.mark.parametrize("write", [as_csv, as_parquet])
def test_the_advice_helps(tmp_path, write):
    times = zoned() if write is as_parquet else zoned().tz_localize(None)
    table = frame(times)
    with pytest.raises(DataError) as refused:
        read_series(write(table, tmp_path))
    converted, named = re.findall(r"times\.tz_\S.*?\)(?= for|$)", str(refused.value))
    if table.index.tz is None:
        times = eval(named, {"times": table.index, "ZONE": "America/Los_Angeles"})
    table.index = eval(converted, {"times": times})
    series = read_series(write(table, tmp_path))
    assert set(np.diff(series.timestamps).astype(int)) == {900}


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_hdf5])
@pytest.mark.parametrize("zone", [None, "UTC", "America/Los_Angeles"])
def test_the_clock_of_the_zone_is_read(tmp_path, write, zone):
    clock = pd.date_range("2017-01-01", periods=9, freq="5min")
    series = read_series(write(frame(clock.tz_localize(zone)), tmp_path))
    np.testing.assert_array_equal(series.timestamps, clock.to_numpy().astype("datetime64[s]"))
    if zone == "UTC":
        assert "in UTC" in series.notes[0] and "tz_convert" in series.notes[0]
    elif zone is None:
        assert series.notes == ()
    elif write is not as_csv:  # which has the distance to UTC only
        assert series.notes == ("the times are those of the clock in America/Los_Angeles",)


@pytest.mark.parametrize(
    ("zone", "hours", "note"),
    [
        (datetime.UTC, 0, "in UTC"),
        (zoneinfo.ZoneInfo("UTC"), 0, "in UTC"),
        (zoneinfo.ZoneInfo("Europe/Berlin"), 1, "Europe/Berlin"),
        (datetime.timezone(datetime.timedelta(hours=-8)), -8, "UTC-08:00"),
        (datetime.timezone(datetime.timedelta(hours=-8), "UTC-8"), -8, "UTC-08:00"),
        (datetime.timezone(datetime.timedelta(hours=9), "UTC"), 9, "UTC+09:00"),
        (zoneinfo.ZoneInfo("Etc/UTC"), 0, "in UTC"),
    ],
)
def test_a_pickled_zone_is_recognised_without_unpickling(tmp_path, zone, hours, note):
    clock = pd.date_range("2017-01-01", periods=9, freq="5min")
    path = as_hdf5(frame(clock), tmp_path, pickle.dumps(zone, 0))  # as PyTables writes objects
    series = read_series(path)
    expected = (clock + pd.Timedelta(hours=hours)).to_numpy().astype("datetime64[s]")
    np.testing.assert_array_equal(series.timestamps, expected)
    assert note in series.notes[0]


@pytest.mark.parametrize("zone", ["Z", "+01:00", "-08"])
@pytest.mark.parametrize("zoned", [range(3), range(3, 9)])
def test_a_zone_that_some_times_lack_is_told(tmp_path, zone, zoned):
    table = frame(pd.date_range("2017-01-01", periods=9, freq="5min"))
    stamps = table.index.strftime("%Y-%m-%d %H:%M:%S")
    table.index = pd.Index([s + zone * (n in zoned) for n, s in enumerate(stamps)], name="time")
    row = 3 if 0 in zoned else 0
    with pytest.raises(DataError, match=f"others none, the first '2017-01-01 00:.*' in row {row} "):
        read_series(as_csv(table, tmp_path))


def test_distances_to_utc_that_change_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"distance to UTC changes.*standard time"):
        read_series(as_csv(frame(zoned()), tmp_path))
