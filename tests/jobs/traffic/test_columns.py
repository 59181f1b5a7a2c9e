"""`data.columns`: what is said of a table is read as it is said, in files of each kind."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from expt.errors import DataError
from expt.jobs.traffic.choice import Choice, Columns
from expt.jobs.traffic.data import TrafficData
from expt.jobs.traffic.reading import read_series
from expt.jobs.traffic.series import Series

TIMES = pd.date_range("2024-01-01", periods=48, freq="h")
SPEEDS = np.random.default_rng(0).integers(20, 70, (48, 2)).astype(float)


def written(table: pd.DataFrame, folder: Path, suffix: str) -> Path:
    path = folder / f"x.{suffix}"
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        with h5py.File(path, "w") as file:
            group = file.create_group("df")
            group["axis0"] = np.array([*table], "S")
            group["axis1"] = np.arange(len(table))
            group["axis1"].attrs["kind"] = "integer"
            for number, (name, column) in enumerate(table.items()):
                cells = column.to_numpy()
                cells = cells.astype("M8[s]").view("i8") if cells.dtype.kind == "M" else cells
                group[f"block{number}_items"] = np.array([name], "S")
                group[f"block{number}_values"] = cells[:, None]
    return path


def read(path: Path, **columns: Any) -> Series:
    return read_series(path, choice=Choice(columns=Columns.of(columns)))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "h5"])
def test_what_is_named_is_used_wherever_it_stands(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame(
        {
            "index": np.arange(96),
            "sensor_id": np.tile([1, 2], 48),
            "speed": 1.0,
            "loaded": np.repeat(TIMES + pd.Timedelta("7min"), 2),
            "k": np.tile([631259456789123071, 631259456789123072], 48),
            "t": np.repeat(TIMES, 2),
            "773869": SPEEDS.reshape(-1),
        }
    )
    series = read(written(table, tmp_path, suffix), time="t", sensor="k", value=773869)
    assert series.sensor_ids == ("631259456789123071", "631259456789123072")
    np.testing.assert_array_equal(series.values, np.float32(SPEEDS))
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_of_a_wide_table_the_sensors_may_be_named(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"hour": SPEEDS[:, 0], "at": TIMES, "773869": SPEEDS[:, 1], "week": 3})
    path = written(table, tmp_path, suffix)
    assert read(path, time="at").sensor_ids == ("hour", "773869", "week")
    series = read(path, time="at", value=["hour", 773869])
    assert series.sensor_ids == ("hour", "773869")
    np.testing.assert_array_equal(series.values, np.float32(SPEEDS))
    assert series.notes == ("left week",)


@pytest.mark.parametrize(
    "clock",
    [
        {"a": TIMES.strftime("%H:%M:%S")},
        {"a": TIMES.strftime("%I:%M %p")},
        {"a": TIMES.hour},
        {"a": TIMES.hour, "b": 0},
        {"a": TIMES.hour, "b": 0, "c": 0.0},
    ],
)
def test_times_are_made_of_parts(tmp_path: Path, clock: dict[str, Any]) -> None:
    table = pd.DataFrame({**clock, "day": TIMES.strftime("%Y-%m-%d"), "s": SPEEDS[:, 0]})
    series = read(written(table, tmp_path, "csv"), time=["day", *clock], value="s")
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"time": "x"}, "there is no column 'x'; found t, day, hour, k, v"),
        ({"time": "t", "sensor": "x", "value": "v"}, "there is no column 'x'; found t"),
        ({"time": "t", "value": ["v", "x"]}, "there is no column 'x'; found t"),
        ({"time": "k", "value": "v"}, "the times in 'k' are whole numbers"),
        ({"time": ["t", "hour"], "value": "v"}, "'t' has times of the day, and hour cannot be"),
        ({"time": ["day", "k"], "value": "v"}, r"row 0 .* of 'k' is 30; .* hours from 0 to 23"),
        ({"time": "t", "value": "day"}, "column 'day' holds '2024-01-01'"),
        ({"time": "day", "sensor": "k", "value": "v"}, "sensor 30 has 24 rows at 2024-01-01"),
    ],
)
def test_what_is_not_so_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    day = TIMES.strftime("%Y-%m-%d")
    table = pd.DataFrame({"t": TIMES, "day": day, "hour": TIMES.hour, "k": 30, "v": SPEEDS[:, 0]})
    with pytest.raises(DataError, match=message):
        read(written(table, tmp_path, "csv"), **columns)


@pytest.mark.parametrize(
    ("columns", "others", "message"),
    [
        ({"times": "t"}, {}, "has no key 'times'; expected time, sensor and value"),
        ({"value": "v"}, {}, "lacks time"),
        ({"time": "t", "sensor": "k"}, {}, "lacks value"),
        ({"time": "t", "sensor": "k", "value": ["v", "w"]}, {}, "one column of sensors"),
        ({"time": "t", "value": 12.5}, {}, 'in quotes .* "12.5"'),
        ({"time": "t", "value": "t"}, {}, "names 't' twice"),
        ({"time": "t"}, {"channel": "v"}, "data.channel=v and data.columns are not given together"),
        ({"time": "t"}, {"start": "2024-01-01", "step_minutes": 5}, "are not given together"),
    ],
)
def test_a_description_is_judged_before_reading(
    columns: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    (problem,) = TrafficData.problems({"columns": columns, **others})
    with pytest.raises(DataError, match=message):
        raise DataError(problem)


def test_arrays_have_no_columns(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", speed=SPEEDS, timestamps=TIMES.to_numpy())
    with pytest.raises(DataError, match=r"here are arrays: leave it out, data.columns=null"):
        read(tmp_path / "x.npz", time="timestamps")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["speed"], file["timestamps"] = SPEEDS, TIMES.to_numpy().view("i8")
    with pytest.raises(DataError, match=r"here are arrays: leave it out, data.columns=null"):
        read(tmp_path / "x.h5", time="timestamps")


@pytest.mark.parametrize(
    "name", ["Report Date", "0401", "773869", 'a "b" c', "null", "it's", "ä,{"]
)
def test_the_ready_line_says_what_it_should(name: str) -> None:
    columns = Columns((name, "hour"), f"{name}1", ("v",))
    (argument,) = shlex.split(columns.setting())
    value = OverridesParser.create().parse_override(argument).value()
    assert isinstance(value, dict)
    plain = {
        str(key): [str(part) for part in found] if isinstance(found, list) else str(found)
        for key, found in ((key, _plain(found)) for key, found in value.items())
    }
    assert Columns.of(plain) == columns


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.text.replace('\\"', '"') if hasattr(value, "text") else value


def test_data_without_times_may_be_described_too(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": np.arange(48), "a": SPEEDS[:, 0], "b": SPEEDS[:, 1]})
    choice = Choice(start="2024-01-01", step_minutes=60, columns=Columns.of({"value": ["b"]}))
    series = read_series(written(table, tmp_path, "csv"), choice=choice)
    assert series.sensor_ids == ("b",)
    np.testing.assert_array_equal(series.timestamps, TIMES.to_numpy().astype("M8[s]"))
