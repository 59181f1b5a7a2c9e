"""Long tables, a row per time and sensor, against the same series as a wide one."""

import time

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from expt.errors import DataError
from expt.jobs.traffic.choice import Choice
from expt.jobs.traffic.layout import guessed
from expt.jobs.traffic.reading import read_series
from expt.jobs.traffic.table import Table

TIMES = pd.date_range("2017-01-01", periods=40, freq="5min", name="timestamp")


def wide(sensors=3, times=TIMES):
    speeds = np.random.default_rng(0).uniform(20, 70, (len(times), sensors)).round(2)
    return pd.DataFrame(speeds, index=times, columns=[str(400001 + n) for n in range(sensors)])


def long(frame, sensor="sensor_id", value="speed"):
    name = frame.index.name or "time"
    table = frame.rename_axis(name).reset_index()
    table = table.melt(name, var_name=sensor, value_name=value)
    return table.astype({sensor: int})


def saved(table, folder, **options):
    table.to_csv(folder / "long.csv", **{"index": False, **options})
    return folder / "long.csv"


ORDERS = {
    "by sensor": lambda table: table,
    "by time": lambda table: table.sort_values("timestamp", kind="stable"),
    "shuffled": lambda table: table.sample(frac=1, random_state=0),
    "sensor first": lambda table: table[["sensor_id", "timestamp", "speed"]],
    "other names": lambda table: table.rename(columns={"sensor_id": "k", "speed": "v"}).assign(
        k="s" + table["sensor_id"].astype(str)
    ),
    "text ids": lambda table: table.assign(sensor_id="s" + table["sensor_id"].astype(str)),
    "more columns": lambda table: table.assign(flow=7.5, lanes=4),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sensors", [1, 3])
def test_a_long_table_is_made_wide(tmp_path, order, sensors):
    if order == "other names" and sensors == 1:
        return  # nothing tells it from a wide table
    expected = wide(sensors)
    series = read_series(saved(ORDERS[order](long(expected)), tmp_path))
    ids = [name.removeprefix("s") for name in series.sensor_ids]
    assert sorted(ids) == [*expected.columns]
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("datetime64[s]"))
    np.testing.assert_array_equal(series.values, expected[ids].to_numpy(np.float32))
    assert series.notes[0].startswith("long table: read ")


@pytest.mark.parametrize("sensor", ["sensor", "StationID", "detector_id", "VDS", "link id", "id"])
def test_columns_of_sensors_are_known_by_their_names(tmp_path, sensor):
    series = read_series(saved(long(wide(1), sensor), tmp_path))
    assert series.sensor_ids == ("400001",)
    assert f"by {sensor}," in series.notes[0]


def test_row_numbers_in_front_are_passed_over(tmp_path):
    assert read_series(saved(long(wide()), tmp_path, index=True)).values.shape == (40, 3)
    path = saved(wide().reset_index(), tmp_path, index=True)
    assert read_series(path).sensor_ids == ("400001", "400002", "400003")


def test_missing_rows_are_missing_readings(tmp_path):
    table = long(wide()).drop(index=[3, 50])
    assert (read_series(saved(table, tmp_path)).values == 0).sum() == 2


@pytest.mark.parametrize("index", [[], ["timestamp"], ["timestamp", "sensor_id"]])
def test_a_long_parquet_table_is_made_wide(tmp_path, index):
    table = long(wide())
    (table.set_index(index) if index else table).to_parquet(tmp_path / "x.parquet")
    series = read_series(tmp_path / "x.parquet")
    np.testing.assert_array_equal(series.values, wide().to_numpy(np.float32))


def test_a_long_archive_is_made_wide(tmp_path):
    table = long(wide())
    columns = {"speed": table["speed"], "timestamps": table["timestamp"]}
    np.savez(tmp_path / "x.npz", **columns, sensor_ids=table["sensor_id"])
    series = read_series(tmp_path / "x.npz")
    np.testing.assert_array_equal(series.values, wide().to_numpy(np.float32))


def test_of_several_readings_one_is_named(tmp_path):
    table = long(wide(), value="occupancy").assign(flow=np.tile([200.0, 201.5], 60))
    path = saved(table, tmp_path)
    line = "'data.columns={time:timestamp,sensor:sensor_id,value:occupancy}'"
    with pytest.raises(DataError, match=rf"long table .*several .*occupancy, flow; .* {line}"):
        read_series(path)
    series = read_series(path, choice=Choice(channel="flow"))
    assert (series.values >= 200).all()
    with pytest.raises(DataError, match=r"data.channel=x: the table has no such column"):
        read_series(path, choice=Choice(channel="x"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: pd.concat([table, table.assign(lane=2)]),
        lambda table: table.assign(flow=1.0).melt(["timestamp", "sensor_id"]),
        lambda table: table.drop(columns="sensor_id"),
        lambda table: table.assign(
            timestamp=table["timestamp"] + pd.to_timedelta(np.arange(len(table)), "s")
        ).pipe(lambda shifted: pd.concat([shifted] * 1).assign(sensor_id=np.arange(120) // 2)),
    ],
)
def test_what_cannot_be_made_wide_is_refused_as_a_long_table(tmp_path, spoil):
    with pytest.raises(DataError, match="long table") as refused:
        read_series(saved(spoil(long(wide())), tmp_path))
    assert "drop" not in str(refused.value)


def test_a_wide_table_stays_one(tmp_path):
    table = wide().round(0).astype(int).rename(columns={"400001": "sensor_1", "400002": "node"})
    series = read_series(saved(table, tmp_path, index=True))
    assert series.sensor_ids == ("sensor_1", "node", "400003")
    assert series.notes == ()


TWICE = np.repeat(TIMES, 2)
DRAW = np.random.default_rng(0)


def test_readings_are_not_taken_for_sensors(tmp_path):
    fast = np.where(np.arange(80) % 2, DRAW.integers(50, 60, 80), DRAW.integers(30, 40, 80))
    table = pd.DataFrame({"time": TWICE, "speed": fast, "direction": np.tile(["N", "S"], 40)})
    for given in (table, table.rename(columns={"speed": "v"})):
        series = read_series(saved(given, tmp_path))
        assert series.sensor_ids == ("N", "S")
        np.testing.assert_array_equal(series.values, np.float32(fast.reshape(40, 2)))
    table["direction"] = np.tile([1, 2], 40)
    with pytest.raises(DataError, match="time:time,sensor:direction,value:speed}"):
        read_series(saved(table, tmp_path))


def test_of_two_columns_that_are_called_so_one_tells_rows_apart(tmp_path):
    table = long(wide())
    table.insert(1, "number", DRAW.integers(0, 3, len(table)))
    table.insert(1, "road_name", "A 1")
    assert set(read_series(saved(table, tmp_path)).sensor_ids) == {"400001", "400002", "400003"}


@pytest.mark.parametrize("name", ["counter", "number", "link"])
def test_counts_beside_one_detectors_speeds_are_no_sensors(tmp_path, name):
    times = pd.date_range("2017-11-01", periods=500, freq="5min").append(TIMES[:6])
    table = pd.DataFrame({"time": times, name: DRAW.integers(0, 40, 506), "speed": 50.5})
    table.loc[500:, "time"] = times[100:106]  # as in an hour of autumn
    for given in (table, table[:500]):
        with pytest.raises(DataError, match=rf"'{name}' is called like .* hardly any time has two"):
            read_series(saved(given, tmp_path))
    one = table[:500].assign(site="A 1")
    assert read_series(saved(one, tmp_path)).sensor_ids == ("A 1",)


@pytest.mark.parametrize("offset", ["30s", "2min"])
def test_sensors_with_times_of_their_own_are_refused(tmp_path, offset):
    sensors = [
        long(wide(3, TIMES + n * pd.Timedelta(offset))).assign(
            sensor_id=lambda t, n=n: t.sensor_id + n * 10
        )
        for n in range(2)
    ]
    with pytest.raises(DataError, match=r"long table .* 6 sensors whose times differ.* resample"):
        read_series(saved(pd.concat(sensors), tmp_path))


@pytest.mark.parametrize("share", [0.3, 0.05])
def test_sensors_that_miss_most_rows_are_read(tmp_path, share):
    times = pd.date_range("2017-01-01", periods=400, freq="5min", name="timestamp")
    table = long(wide(30, times)).sample(frac=share, random_state=0)
    series = read_series(saved(table, tmp_path))
    assert series.step_seconds == 300 and (series.values > 0).sum() == len(table)


def test_sensors_at_other_intervals_than_one_are_refused(tmp_path):
    slow = long(wide(8, TIMES[::3]))
    fast = long(wide(1)).assign(sensor_id=7)
    with pytest.raises(DataError, match="mostly 900 s apart, and those of all 300 s; resample"):
        read_series(saved(pd.concat([slow, fast]), tmp_path))


@pytest.mark.parametrize("prefix", ["", "s"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_without_a_sensor_are_left_out(tmp_path, prefix, suffix):
    table = long(wide())
    ids = table["sensor_id"].astype(float if not prefix else str)
    table["sensor_id"] = ids if not prefix else prefix + ids
    table.loc[[3, 50], "sensor_id"] = np.nan if not prefix else None
    if suffix == "csv":
        series = read_series(saved(table, tmp_path))
    else:
        table.to_parquet(tmp_path / "x.parquet")
        series = read_series(tmp_path / "x.parquet")
    assert series.sensor_ids == tuple(prefix + name for name in wide().columns)
    assert (series.values == 0).sum() == 2
    assert "2 rows without a sensor in sensor_id: left out" in series.notes


def test_many_columns_are_looked_through_at_once():
    columns = {str(400_000 + n): np.full(40, 50.5) for n in range(20_000)}
    table = Table({"time": TIMES.to_numpy(), **columns}.items())
    started = time.perf_counter()
    assert guessed(table, Choice())[0].value == tuple(columns)
    assert time.perf_counter() - started < 10  # took minutes when every pair of names was compared


@pytest.mark.parametrize("ids", [("0401", "0402"), ("1", "01"), ("7", "010"), ("007", "")])
def test_ids_keep_their_leading_zeros(tmp_path, ids):
    table = pd.DataFrame({"time": TWICE, "sensor_id": np.tile(ids, 40), "speed": 50.5})
    series = read_series(saved(table, tmp_path))
    assert series.sensor_ids == tuple(name for name in ids if name)


@pytest.mark.parametrize("ids", [("401", "402"), ("401.0", "402.0"), (" 401", "402 "), ("0", "10")])
def test_ids_without_leading_zeros_are_whole_numbers(tmp_path, ids):
    table = pd.DataFrame({"time": TWICE, "sensor_id": np.tile(ids, 40), "speed": 50.5})
    series = read_series(saved(table, tmp_path))
    assert series.sensor_ids == tuple(name.strip().removesuffix(".0") for name in ids)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_large_ids_are_not_rounded_where_one_is_empty(tmp_path, suffix):
    ids = [631259456789123071, 631259456789123072, None] * 40
    columns = {"time": np.repeat(TIMES, 3), "segment_id": ids, "speed": np.arange(120) + 0.5}
    if suffix == "csv":
        path = saved(pd.DataFrame(columns | {"segment_id": pd.Series(ids, dtype=object)}), tmp_path)
    else:
        path = tmp_path / "x.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    series = read_series(path)
    assert series.sensor_ids == ("631259456789123071", "631259456789123072")
    np.testing.assert_array_equal(series.values[1], [3.5, 4.5])


@pytest.mark.parametrize("ids", [("NA", "SA"), ("null", "7"), ("None", "1e3"), ("N/A", "nan")])
def test_only_an_empty_cell_is_no_id(tmp_path, ids):
    table = pd.DataFrame({"time": np.repeat(TIMES, 3), "sensor": np.tile((*ids, ""), 40)})
    series = read_series(saved(table.assign(speed=50.5), tmp_path))
    assert series.sensor_ids == ids
    assert "40 rows without a sensor in sensor: left out" in series.notes
