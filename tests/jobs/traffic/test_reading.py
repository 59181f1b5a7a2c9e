"""The shipped week of METR-LA, written in every format and read back the same."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import expt.jobs.traffic.reading as module
from expt.errors import DataError
from expt.jobs.traffic.choice import Choice
from expt.jobs.traffic.reading import read_series

FILES = Path(module.__file__).parent / "files"
WEEK = FILES / "metr_la_week.npz"


@pytest.fixture(scope="module")
def week():
    with np.load(WEEK) as file:
        return {
            name: file[name]
            for name in ("speed", "timestamps", "sensor_ids", "adjacency", "locations")
        }


def as_frame(week):
    return pd.DataFrame(week["speed"], index=week["timestamps"], columns=week["sensor_ids"])


def as_npz(week, folder):
    np.savez(folder / "week.npz", **week)
    return folder / "week.npz"


def as_npz_with_channels(week, folder):
    time_of_day = np.broadcast_to(np.linspace(0, 1, 2016)[:, None], week["speed"].shape)
    data = np.stack([week["speed"], time_of_day], axis=-1)
    np.savez(folder / "week.npz", **{**week, "speed": data})
    return folder / "week.npz"


def as_csv(week, folder):
    as_frame(week).to_csv(folder / "week.csv")
    return folder / "week.csv"


def as_parquet(week, folder):
    as_frame(week).to_parquet(folder / "week.parquet")
    return folder / "week.parquet"


def as_plain_hdf5(week, folder):
    with h5py.File(folder / "week.hdf5", "w") as file:
        for name, array in week.items():
            kind = array.dtype.kind
            file[name] = (
                array.astype("S") if kind == "U" else array.view("i8") if kind == "M" else array
            )
    return folder / "week.hdf5"


WRITERS = [as_npz, as_npz_with_channels, as_csv, as_parquet, as_plain_hdf5]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_series(week, tmp_path, write):
    series = read_series(write(week, tmp_path))
    np.testing.assert_array_equal(series.values, week["speed"])
    np.testing.assert_array_equal(series.timestamps, week["timestamps"])
    assert series.values.dtype == np.float32
    assert series.timestamps.dtype == np.dtype("datetime64[s]")
    assert series.sensor_ids == tuple(week["sensor_ids"].tolist())
    assert series.fingerprint() == read_series(WEEK).fingerprint()
    if write not in (as_csv, as_parquet):
        np.testing.assert_array_equal(series.adjacency, week["adjacency"])
        np.testing.assert_array_equal(series.locations, week["locations"])


def test_the_shipped_files_have_the_published_figures():
    week, months = read_series(WEEK), read_series(FILES / "metr_la_29.npz")
    assert week.values.shape == (2016, 207)
    assert (week.values == 0).mean() == pytest.approx(0.0431, abs=0.00005)
    assert week.values[week.values > 0].mean(dtype=np.float64) == pytest.approx(58.94, abs=0.005)
    assert np.count_nonzero(week.adjacency) == 1722
    assert months.values.shape == (34272, 29)
    assert np.count_nonzero(months.adjacency) == 181


def write_graph(week, path, order):
    ids = week["sensor_ids"][order].tolist()
    matrix = week["adjacency"][np.ix_(order, order)]
    path.write_bytes(pickle.dumps([ids, {name: row for row, name in enumerate(ids)}, matrix]))
    return path


def test_a_graph_file_is_put_in_the_order_of_the_series(week, tmp_path):
    graph = write_graph(week, tmp_path / "adj.pkl", np.arange(207)[::-1])
    series = read_series(as_csv(week, tmp_path), graph)
    np.testing.assert_array_equal(series.adjacency, week["adjacency"])


def test_a_graph_file_takes_the_place_of_the_own_graph(week, tmp_path):
    np.savez(tmp_path / "eye.npz", adjacency=np.eye(207))
    path = as_npz({**week, "adjacency": np.eye(3)}, tmp_path)  # of no use, and not looked at
    series = read_series(path, tmp_path / "eye.npz")
    np.testing.assert_array_equal(series.adjacency, np.eye(207))


def test_a_series_without_ids_takes_those_of_the_graph(week, tmp_path):
    path = tmp_path / "unnamed.npz"
    np.savez(path, data=week["speed"], timestamps=week["timestamps"])
    assert read_series(path).sensor_ids[:3] == ("0", "1", "2")
    series = read_series(path, write_graph(week, tmp_path / "adj.pkl", np.arange(207)))
    assert series.sensor_ids == tuple(week["sensor_ids"].tolist())
    np.testing.assert_array_equal(series.adjacency, week["adjacency"])


def test_a_graph_of_another_size_is_refused_and_named(week, tmp_path):
    graph = tmp_path / "adj.pkl"
    graph.write_bytes(pickle.dumps(week["adjacency"]))
    with pytest.raises(
        DataError,
        match=r"adj.pkl: wrong sensor count .* series has 29 sensors, the adjacency 207",
    ):
        read_series(FILES / "metr_la_29.npz", graph)


def test_a_graph_of_other_sensors_is_refused(week, tmp_path):
    other = {**week, "sensor_ids": np.char.add(week["sensor_ids"], "9")}
    graph = write_graph(other, tmp_path / "adj.pkl", np.arange(207))
    with pytest.raises(DataError, match=r"lacks 207 of the series' 207 sensors: '773869', "):
        read_series(WEEK, graph)


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".hdf5", ".csv", ".parquet"])
def test_garbage_is_refused_in_every_format(tmp_path, suffix):
    path = tmp_path / f"speed{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DataError, match=f"^{path}: "):
        read_series(path)


@pytest.mark.parametrize("write", [as_npz, as_parquet, as_plain_hdf5])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_every_format(week, tmp_path, write, keep):
    path = write(week, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=f"^{path}: cannot be read as .* copy or download it again"):
        read_series(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.npz", "no such file"),
        ("folder.npz", "is a directory"),
        ("empty.h5", r"is empty \(0 bytes\)"),
        ("speed.xlsx", "unknown suffix '.xlsx'; expected one of .csv, .h5, .hdf5, .npz, .parquet"),
    ],
)
def test_what_is_no_data_file_is_refused(tmp_path, name, message):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "empty.h5").touch()
    (tmp_path / "speed.xlsx").write_text("x")
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read_series(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamps": [3, 2, 1]}, "whole numbers, the first 3"),
        ({"speed": np.full((2016, 207), -1.0)}, "negative"),
        ({"speed": np.full((2016, 207), np.inf)}, "not finite"),
        ({"speed": np.full((2016, 207), np.nan)}, "all values are missing"),
        ({"speed": np.ones((2016, 207, 0))}, "expected two axes"),
        ({"speed": np.float64(60)}, "expected two axes"),
        ({"adjacency": np.eye(3)}, "wrong sensor count"),
    ],
)
def test_unsound_contents_are_refused_with_the_path(week, tmp_path, changes, message):
    path = as_npz({**week, **changes}, tmp_path)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        read_series(path)


def test_a_graph_without_ids_is_refused_beside_a_long_table(tmp_path):
    times = pd.date_range("2024-01-01", periods=9, freq="5min")
    table = pd.DataFrame({"t": np.repeat(times, 2), "sensor": np.tile([7, 8], 9), "speed": 50.5})
    table.iloc[1:].to_csv(tmp_path / "x.csv", index=False)
    np.savez(tmp_path / "eye.npz", adjacency=np.eye(2))
    with pytest.raises(DataError, match="names no sensors, and the series is a long table"):
        read_series(tmp_path / "x.csv", tmp_path / "eye.npz")
    np.savez(tmp_path / "named.npz", adjacency=np.tri(2), sensor_ids=[7, 8])
    series = read_series(tmp_path / "x.csv", tmp_path / "named.npz")
    assert series.sensor_ids == ("8", "7") and series.adjacency[0, 1] == 1


def test_times_of_another_name_and_a_turned_array_are_told(tmp_path):
    times = np.datetime64("2024-01-01", "s") + 300 * np.arange(90)
    np.savez(tmp_path / "x.npz", speed=np.full((90, 2), 50.5), time=times)
    given = Choice(start="2024-01-01", step_minutes=5)
    with pytest.raises(DataError, match=r"has no timestamps, but time; .* save them as `times"):
        read_series(tmp_path / "x.npz")
    assert len(read_series(tmp_path / "x.npz", choice=given).values) == 90, "they may be none"
    np.savez(tmp_path / "x.npz", speed=np.full((2, 90), 50.5))
    (note,) = read_series(tmp_path / "x.npz", choice=given).notes
    assert note.startswith("2 time steps of 90 sensors: ") and "speed.T" in note
