"""What is guessed of a table, and what is refused because it has several readings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from expt.errors import DataError
from expt.jobs.traffic.choice import Choice
from expt.jobs.traffic.reading import read_series
from expt.jobs.traffic.series import Series

TIMES = pd.date_range("2012-03-01", periods=864, freq="5min")
IDS = ["773869", "767541", "767542"]
SPEEDS = np.random.default_rng(0).integers(20, 70, (864, 3)) + 0.5


def long() -> pd.DataFrame:
    columns = {"timestamp": np.repeat(TIMES, 3), "sensor_id": np.tile(IDS, 864)}
    return pd.DataFrame({**columns, "speed": SPEEDS.reshape(-1)})


def wide() -> pd.DataFrame:
    return pd.DataFrame(SPEEDS, columns=IDS).assign(timestamp=TIMES)[["timestamp", *IDS]]


def read(table: pd.DataFrame, folder: Path, suffix: str = "csv", **choice: object) -> Series:
    path = folder / f"x.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    return read_series(path, choice=Choice(**choice))  # type: ignore[arg-type]


def is_right(series: Series) -> bool:
    expected = np.float32(SPEEDS)[:, [IDS.index(name) for name in series.sensor_ids]]
    return series.values.shape == (864, 3) and np.array_equal(series.values, expected)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    "columns",
    [
        {"index": np.tile(np.arange(3), 864)},
        {"no": np.arange(2592) % 864},
        {"id": np.arange(2592)},
        {"inserted_at": np.repeat(TIMES + pd.Timedelta("7min"), 3)},
        {"date": np.repeat(TIMES.strftime("%Y-%m-%d"), 3)},
        {"name": "x", "max_speed": 8.0, "lanes": 3, "": 7},
    ],
)
def test_other_columns_of_a_long_table_are_left(
    tmp_path: Path, columns: dict[str, object], suffix: str
) -> None:
    series = read(long().assign(**columns)[[*columns, *long()]], tmp_path, suffix)
    assert is_right(series)
    assert f"left {next(iter(columns))}" in series.notes[0]


def test_dates_and_times_beside_row_numbers_that_restart(tmp_path: Path) -> None:
    table = long().assign(
        index=np.arange(2592) % 864,
        date=np.repeat(TIMES.strftime("%Y-%m-%d"), 3),
        time=np.repeat(TIMES.strftime("%H:%M"), 3),
    )
    assert is_right(read(table[["index", "date", "time", "sensor_id", "speed"]], tmp_path))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    "columns",
    [
        {"slot": np.arange(864) % 288},
        {"k": np.arange(864) % 288},
        {"minute": TIMES.minute},
        {"week": 9},
        {"Unnamed: 0": np.random.default_rng(0).permutation(864)},
        {"road": "A 1"},
        {"time": TIMES.strftime("%H:%M")},
        {"end": TIMES + pd.Timedelta("5min")},
    ],
)
def test_other_columns_of_a_wide_table_are_left(
    tmp_path: Path, columns: dict[str, object], suffix: str
) -> None:
    (name,) = columns
    for order in ([name, *wide()], [*wide(), name]):
        table = wide().assign(**columns)[order]
        if name != "Unnamed: 0" or order[0] == name:
            series = read(table, tmp_path, suffix)
            assert is_right(series) and series.notes[0].startswith(f"left {name}: ")
    table = wide().assign(silent=0, **columns)[[name, *wide(), "silent"]]
    assert read(table, tmp_path).sensor_ids == (*IDS, "silent")


@pytest.mark.parametrize(
    ("columns", "message", "line"),
    [
        (
            {"updated": np.repeat(TIMES + pd.to_timedelta(np.arange(864) % 7, "min"), 3)},
            "several columns of times, which differ: updated, .*; timestamp, ",
            "{time:updated,sensor:sensor_id,value:speed}",
        ),
        (
            {"car_speed": 1.5, "speed": None, "truck_speed": 2.5},
            "several columns of re",
            "car_speed}",
        ),
        (
            {"link": (np.arange(2592) + np.arange(2592) // 1296) % 3},
            "not clear .*: link, sensor_id",
            "sensor:link",
        ),
        ({"id": np.tile(np.arange(3), 864), "sensor_id": None}, "not clear .*: id", "sensor:id"),
        ({"k": np.tile([5, 7, 6], 864), "sensor_id": None}, "not clear .*: k", "sensor:k"),
    ],
)
def test_of_several_readings_none_is_taken(
    tmp_path: Path, columns: dict[str, object], message: str, line: str
) -> None:
    added = {name: column for name, column in columns.items() if column is not None}
    table = long().assign(**added)[[*added, *long()]]
    table = table.drop(columns=[name for name, column in columns.items() if column is None])
    with pytest.raises(DataError, match=message) as refused:
        read(table, tmp_path)
    assert line in str(refused.value) and "'data.columns={" in str(refused.value)


@pytest.mark.parametrize(
    "hours", [[f"{hour:02d}:00" for hour in range(24)], [*map(str, range(24))]]
)
def test_a_column_per_time_of_day_is_refused(tmp_path: Path, hours: list[str]) -> None:
    table = pd.DataFrame(SPEEDS[:720].reshape(-1, 24), columns=hours)
    table.insert(0, "date", pd.date_range("2012-03-01", periods=len(table)))
    with pytest.raises(DataError, match=r"a column per time of day, .*frame.melt\('date', "):
        read(table, tmp_path)


@pytest.mark.parametrize("form", ["%Y%m%d%H", "%y%m%d%H%M", "%Y%m%d%H%M", "%Y%m%d"])
def test_dates_written_as_numbers_are_not_counted_since_1970(tmp_path: Path, form: str) -> None:
    table = wide().assign(timestamp=TIMES.strftime(form).astype(int))
    with pytest.raises(DataError, match="which may be written as YY"):
        read(table, tmp_path)
    np.savez(tmp_path / "x.npz", speed=SPEEDS, timestamps=table["timestamp"])
    with pytest.raises(DataError, match="which may be written as YY"):
        read_series(tmp_path / "x.npz")


def test_numbers_since_1970_are_said_to_be_in_utc(tmp_path: Path) -> None:
    table = wide().assign(timestamp=TIMES.to_numpy().astype("M8[s]").astype(int))
    assert read(table, tmp_path).notes[0].startswith("the times count since 1970 in UTC")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_without_times_has_those_of_the_start(tmp_path: Path, suffix: str) -> None:
    table = wide().drop(columns="timestamp")
    series = read(table, tmp_path, suffix, start="2012-03-01", step_minutes=5)
    assert is_right(series)
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))
    with pytest.raises(DataError, match=r"data.start and data.step_minutes"):
        read(table, tmp_path, suffix)
    headless = table.set_axis([str(value) for value in SPEEDS[0] + [0, 0.25, 0.125]], axis=1)
    with pytest.raises(DataError, match="has no header"):
        read(headless, tmp_path, start="2012-03-01", step_minutes=5)


def test_times_in_several_zones_are_told_in_parquet_too(tmp_path: Path) -> None:
    stamps = [
        time.isoformat() + ("-08:00" if n < 400 else "-07:00") for n, time in enumerate(TIMES)
    ]
    with pytest.raises(DataError, match="distance to UTC changes"):
        read(wide().assign(timestamp=stamps), tmp_path, "parquet")


def test_streets_tell_rows_apart_where_a_number_does_not(tmp_path: Path) -> None:
    table = long().rename(columns={"sensor_id": "street"})
    table["street"] = "st " + table["street"]
    table["number"] = np.random.default_rng(0).integers(0, 50, len(table))
    assert len(read(table, tmp_path).sensor_ids) == 3
    with pytest.raises(DataError, match="sensor:street,value:speed"):
        read(table.assign(road_no=1 + np.arange(len(table)) % 3 // 2), tmp_path)


@pytest.mark.parametrize("ids", [("101.1", "101.10", "3.0"), (" 401", "402 ", "403")])
def test_ids_with_points_or_spaces(tmp_path: Path, ids: tuple[str, ...]) -> None:
    table = long().assign(sensor_id=np.tile(ids, 864))
    assert read(table, tmp_path).sensor_ids == tuple(name.strip() for name in ids)


def test_spaces_after_commas_are_no_part_of_names(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(wide().to_csv(index=False).replace(",", ", "))
    assert is_right(read_series(tmp_path / "x.csv"))


def test_a_damaged_column_of_times_gives_way_to_no_later_one(tmp_path: Path) -> None:
    table = wide().assign(timestamp=TIMES.astype(str), inserted_at=TIMES + pd.Timedelta("7min"))
    table.loc[5, "timestamp"] = "soon"
    with pytest.raises(DataError, match=r"'timestamp' are not all in ISO 8601.* row 5 .* 'soon'"):
        read(table, tmp_path)


@pytest.mark.parametrize(
    "form", ["%Y/%m/%d %H:%M", "%Y%m%d %H:%M", "%Y-%m-%dT%H:%M", "%Y%m%dT%H%M"]
)
def test_times_in_every_form_of_iso_8601(tmp_path: Path, form: str) -> None:
    assert is_right(read(wide().assign(timestamp=TIMES.strftime(form)), tmp_path))
    assert is_right(read(long().assign(timestamp=np.repeat(TIMES.strftime(form), 3)), tmp_path))


@pytest.mark.parametrize(
    ("name", "reading"),
    [("south", 65), ("south", 65.5), ("sec_3", 0), ("sec_3", np.nan), ("Step 2", 61), ("min1", 0)],
)
def test_a_sensor_that_is_stuck_or_dead_stays(tmp_path: Path, name: str, reading: float) -> None:
    series = read(wide().assign(**{name: reading}), tmp_path)
    assert series.sensor_ids == (*IDS, name)


def test_a_short_file_has_the_sensors_of_a_long_one(tmp_path: Path) -> None:
    """Its few readings may be alike, or go up by one."""
    table = wide().assign(south=65, west=np.arange(864) % 12 + 60)
    assert read(table[:36], tmp_path).sensor_ids == (*IDS, "south", "west")


def test_the_line_of_a_table_with_counts_is_that_of_a_wide_one(tmp_path: Path) -> None:
    table = pd.DataFrame({"timestamp": TIMES, "speed": 50.5, "number": np.arange(864) % 7 * 5})
    with pytest.raises(DataError, match=r"data.columns={time:timestamp,value:speed}") as refused:
        read(table, tmp_path)
    assert "'number' is called like" in str(refused.value)
