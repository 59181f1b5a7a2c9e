"""Dates in one column and the time of day in another, in files of each kind."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from expt.errors import DataError
from expt.jobs.traffic.choice import Choice
from expt.jobs.traffic.reading import read_series
from expt.jobs.traffic.series import Series

TIMES = pd.date_range("2024-01-01", periods=72, freq="h")
DATES = TIMES.strftime("%Y-%m-%d")
HOURS = TIMES.hour.to_numpy()


def read(table: pd.DataFrame, folder: Path, **choice: str) -> Series:
    table.to_csv(folder / "x.csv", index=False)
    return read_series(folder / "x.csv", choice=Choice(**choice))  # type: ignore[arg-type]


def speeds(rows: int = 72) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 70, rows).astype(float) + 0.5


CLOCKS = {
    "time": TIMES.strftime("%H:%M"),
    "Time": TIMES.strftime("%H:%M:%S"),
    "hour": HOURS,
    "Hour of day": HOURS,
    "of the day": TIMES.strftime("%H:%M"),
    "at": TIMES.strftime("%I:%M %p"),
    "since": (TIMES - TIMES.normalize()).astype(str),
    "datetime": TIMES.astype(str),
}


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("columns", [["speed"], ["773869"], ["773869", "767541"]])
def test_dates_and_the_time_of_day_are_put_together(
    tmp_path: Path, name: str, columns: list[str]
) -> None:
    table = pd.DataFrame({"date": DATES, name: CLOCKS[name]})
    for column in columns:
        table[column] = speeds()
    for given in (table, table[[name, "date", *columns]]):
        series = read(given, tmp_path)
        np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))
        assert series.sensor_ids == tuple(columns)
        np.testing.assert_array_equal(series.values[:, 0], np.float32(speeds()))
        if name == "datetime":
            assert series.notes == ("left date: times, row numbers, or one value throughout",)
        else:
            assert series.notes == (f"the times are the dates with the time of day in {name}",)


def test_one_column_of_such_a_table_is_read(tmp_path: Path) -> None:
    table = pd.DataFrame({"date": DATES, "hour": HOURS, "a": speeds(), "b": 1.0})
    assert read(table, tmp_path, channel="a").values.shape == (72, 1)


def test_hours_and_minutes_are_put_together(tmp_path: Path) -> None:
    times = pd.date_range("2024-01-01", periods=600, freq="5min")
    clock = {"hour": times.hour, "minute": times.minute, "period": np.arange(600) % 288}
    table = pd.DataFrame({"date": times.strftime("%Y-%m-%d"), **clock, "speed": speeds(600)})
    series = read(table, tmp_path)
    np.testing.assert_array_equal(series.timestamps, times.to_numpy().astype("M8[s]"))
    assert series.notes[0].endswith("time of day in hour, minute")
    assert series.notes[1] == "left period: times, row numbers, or one value throughout"
    assert read(table, tmp_path, channel="period").sensor_ids == ("period",)


@pytest.mark.parametrize("minute", ["minute", "minutes"])
def test_seconds_are_put_to_hours_and_minutes(tmp_path: Path, minute: str) -> None:
    times = pd.date_range("2024-01-01", periods=400, freq="30s")
    table = pd.DataFrame({"date": times.strftime("%Y-%m-%d"), "hour": times.hour})
    table[minute], table["second"], table["speed"] = times.minute, times.second, speeds(400)
    series = read(table, tmp_path)
    np.testing.assert_array_equal(series.timestamps, times.to_numpy().astype("M8[s]"))
    assert series.sensor_ids == ("speed",)


@pytest.mark.parametrize("columns", [["sensor_id", "speed"], ["speed"]])
def test_what_else_looks_like_times_gives_way_to_the_hour(
    tmp_path: Path, columns: list[str]
) -> None:
    others = len(columns)
    table = pd.DataFrame({"date": np.repeat(DATES, others)})
    table["hour"] = np.repeat(HOURS, others)
    table["sensor_id"] = np.tile(np.arange(others), 72)
    table["time"], table["speed"] = np.arange(72 * others) % 7 + 100, speeds(72 * others)
    late = np.repeat(TIMES + pd.Timedelta("10min"), others)
    table = table[["date", "hour", "time", *columns]].assign(loaded_at=late)
    series = read(table, tmp_path)
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))
    np.testing.assert_array_equal(series.values, np.float32(speeds(72 * others)).reshape(72, -1))
    assert read(table, tmp_path, channel="time").values.min() == 100
    table.insert(1, "travel_time", [f"{n % 9:02d}:{n % 59:02d}" for n in range(72 * others)])
    with pytest.raises(DataError, match=r"date \+ travel_time, .* date \+ hour, the first"):
        read(table, tmp_path)


def test_a_long_table_of_dates_and_hours(tmp_path: Path) -> None:
    table = pd.DataFrame({"date": np.repeat(DATES, 2), "hour": np.repeat(HOURS, 2)})
    table["sensor_id"], table["speed"] = np.tile([11, 12], 72), speeds(144)
    series = read(table, tmp_path)
    assert series.sensor_ids == ("11", "12")
    np.testing.assert_array_equal(series.values, np.float32(speeds(144)).reshape(72, 2))


@pytest.mark.parametrize("kind", ["parquet", "date32", "h5"])
def test_other_files_of_dates_and_hours(tmp_path: Path, kind: str) -> None:
    days = pd.to_datetime(pd.Series(DATES))
    if kind != "h5":
        clock = pd.Series([time.time() for time in TIMES])
        dates = days if kind == "parquet" else days.dt.date
        kind = "parquet"
        pd.DataFrame({"date": dates, "time": clock, "a": speeds()}).to_parquet(
            tmp_path / "x.parquet"
        )
    else:
        with h5py.File(tmp_path / "x.h5", "w") as file:
            group = file.create_group("df")
            group["axis0"] = group["block0_items"] = np.array(["hour", "a"], "S")
            group["axis1"] = days.to_numpy().astype("M8[ns]").view("i8")
            group["axis1"].attrs["kind"] = "datetime64"
            group["block0_values"] = np.stack([HOURS, speeds()], axis=1)
    series = read_series(tmp_path / f"x.{kind}")
    assert series.sensor_ids == ("a",)
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))


def test_of_dates_and_full_times_the_times_are_read(tmp_path: Path) -> None:
    table = pd.DataFrame({"date": np.repeat(DATES, 2), "stamp": np.repeat(TIMES, 2)})
    table["sensor_id"], table["speed"] = np.tile([11, 12], 72), speeds(144)
    for suffix in ("csv", "parquet"):
        if suffix == "csv":
            table.to_csv(tmp_path / "x.csv", index=False)
        else:
            table.assign(date=pd.to_datetime(table["date"])).to_parquet(tmp_path / "x.parquet")
        series = read_series(tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))
        assert series.sensor_ids == ("11", "12")


@pytest.mark.parametrize(
    "clock",
    [
        {"time": HOURS * 100},
        {"interval": HOURS},
        {"interval": HOURS * 3600},
        {"minute_of_day": HOURS * 60},
        {"minute": HOURS},
        {"step": HOURS},
        {"t": HOURS.astype(str)},
    ],
)
def test_a_time_of_day_that_is_not_clear_is_refused(
    tmp_path: Path, clock: dict[str, object]
) -> None:
    table = pd.DataFrame({"date": DATES, **clock, "speed": speeds()})
    with pytest.raises(DataError, match=rf"dates are repeated, .* {next(iter(clock))}, speed; "):
        read(table, tmp_path)


@pytest.mark.parametrize("sensor", [[], ["sensor_id"]])
def test_of_a_quarter_of_the_hour_no_sensors_are_made(tmp_path: Path, sensor: list[str]) -> None:
    times = np.repeat(pd.date_range("2024-01-01", periods=192, freq="15min"), 2)
    table = pd.DataFrame({"date": times.strftime("%Y-%m-%d"), "hour": times.hour})
    table["quarter"], table["sensor_id"] = times.minute // 15, np.tile([1, 2], 192)
    table = table[["date", "hour", "quarter", *sensor]].assign(speed=speeds(384))
    with pytest.raises(DataError, match=r"quarter|24 rows at|4 rows at"):
        read(table if sensor else table[::2], tmp_path)


@pytest.mark.parametrize("cell", ["", "25:00", "noon"])
def test_a_row_without_a_time_of_day_is_named(tmp_path: Path, cell: str) -> None:
    table = pd.DataFrame({"date": DATES, "time": CLOCKS["time"], "speed": speeds()})
    table.loc[5, "time"] = cell
    with pytest.raises(DataError, match=r"row 5 \(counted from 0\) of 'time' is .* like 00:05 in"):
        read(table, tmp_path)


DAYS = pd.date_range("2024-01-01", periods=30)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hour", np.repeat(np.arange(30) % 2 + 7, 2)),
        ("hour", np.arange(60) % 3 + 7),
        ("minutes", np.arange(60) % 7),
        ("time", np.arange(60) % 11 + 100),
        ("time", speeds(60)),
        ("interval", 1440),
        ("loaded_at", np.repeat(DAYS + pd.Timedelta("1h"), 2)),
    ],
)
def test_daily_means_of_several_sensors_stay_so(
    tmp_path: Path, name: str, values: np.ndarray
) -> None:
    table = pd.DataFrame({"date": np.repeat(DAYS, 2), "sensor_id": np.tile([1, 2], 30)})
    table["speed"], table[name] = speeds(60), values
    series = read(table, tmp_path)
    np.testing.assert_array_equal(series.timestamps, DAYS.to_numpy().astype("M8[s]"))
    np.testing.assert_array_equal(series.values, np.float32(speeds(60)).reshape(30, 2))


def test_dates_beside_full_times_are_left_out(tmp_path: Path) -> None:
    table = pd.DataFrame({"datetime": TIMES, "date": DATES, "a": speeds()})
    series = read(table, tmp_path)
    assert series.sensor_ids == ("a",)
    assert series.notes == ("left date: times, row numbers, or one value throughout",)
    table["date"] = "2024-05-01"
    with pytest.raises(DataError, match="several columns of times, which differ"):
        read(table, tmp_path)
