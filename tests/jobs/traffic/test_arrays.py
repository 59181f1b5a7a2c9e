import zipfile

import numpy as np
import pytest

from expt.errors import DataError
from expt.jobs.traffic.arrays import made_times, read_npz, wanted_keys
from expt.jobs.traffic.choice import Choice
from expt.jobs.traffic.clock import to_seconds
from expt.jobs.traffic.reading import read_series

TIMES = np.array(["2012-03-01T00:00:00", "2012-03-01T00:05:00"], dtype="datetime64[s]")


@pytest.mark.parametrize("key", ["speed", "values", "data"])
def test_speeds_are_found_under_each_name(tmp_path, key):
    np.savez(tmp_path / "x.npz", **{key: np.ones((2, 3)), "timestamps": TIMES, "other": [1]})
    arrays = read_npz(tmp_path / "x.npz")
    assert arrays.keys() == {"speed", "timestamps"}
    np.testing.assert_array_equal(arrays["speed"], np.ones((2, 3)))


def test_speed_is_preferred():
    names = {"data", "values", "speed", "timestamps", "locations"}
    assert wanted_keys(names) == {
        "speed": "speed",
        "timestamps": "timestamps",
        "locations": "locations",
    }


def test_absent_arrays_are_named():
    with pytest.raises(DataError, match="no speeds; found timestamps, x; expected one of speed, "):
        wanted_keys(["x", "timestamps"])
    with pytest.raises(
        DataError, match=r"no timestamps; found speed.*one datetime64 per time step"
    ):
        wanted_keys(["speed"])


def test_a_single_array_is_refused(tmp_path):
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match="holds a single array"):
        read_npz(tmp_path / "x.npz")


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(DataError, match=r"NumPy archive.*begins like an HDF5 file"):
        read_npz(tmp_path / "x.npz")


def test_pickled_objects_are_refused(tmp_path):
    objects = np.array([{}, "a"], dtype=object)
    for key in ("speed", "timestamps", "sensor_ids"):
        arrays = {"speed": np.ones((2, 2)), "timestamps": TIMES, key: objects}
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(
            DataError, match=rf"{key} holds Python objects.*{key}.astype\(str\)"
        ) as e:
            read_npz(tmp_path / "x.npz")
        assert "damaged" not in str(e.value)


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_archive_is_refused(tmp_path, keep):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, speed=np.random.default_rng(0).random((50, 50)), timestamps=TIMES)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match="BadZipFile"):
        read_npz(path)


def test_a_damaged_member_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, speed=np.random.default_rng(0).random((50, 50)), timestamps=TIMES)
    damaged = bytearray(path.read_bytes())
    damaged[5000:5100] = bytes(100)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged, cut short or of another format"):
        read_npz(path)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_every_resolution_are_understood(unit):
    fine = TIMES.astype(f"datetime64[{unit}]")
    for raw in (fine, fine.astype(np.int64)):
        np.testing.assert_array_equal(to_seconds(raw), TIMES)
        assert to_seconds(raw).dtype == TIMES.dtype


@pytest.mark.parametrize("missing", [[0], [1], [0, 1]])
def test_a_missing_time_is_no_number(missing):
    times = TIMES.astype("datetime64[ns]")
    times[missing] = "NaT"
    np.testing.assert_array_equal(to_seconds(times.view("i8")), times)
    assert to_seconds(times[:0].view("i8")).dtype == TIMES.dtype


def test_times_as_text_are_understood():
    text = ["2012-03-01 00:00:00", "2012-03-01T00:05"]
    np.testing.assert_array_equal(to_seconds(np.array(text)), TIMES)
    np.testing.assert_array_equal(to_seconds(np.array(text).astype("S")), TIMES)


@pytest.mark.parametrize("distance", ["", "Z", "+01:00", "-0800"])
def test_the_clock_is_read_of_times_with_a_distance_to_utc(tmp_path, distance):
    text = np.array([f"2012-03-01T00:00:00{distance}", f"2012-03-01T00:05:00{distance}"])
    np.testing.assert_array_equal(to_seconds(text), TIMES)
    np.testing.assert_array_equal(to_seconds(text.reshape(2, 1)), TIMES.reshape(2, 1))
    start = Choice(start=str(text[0]), step_minutes=5)
    np.testing.assert_array_equal(made_times(start, 2), TIMES)
    np.savez(tmp_path / "x.npz", speed=np.ones((2, 3)), timestamps=text)
    series = read_series(tmp_path / "x.npz")
    np.testing.assert_array_equal(series.timestamps, TIMES)
    assert [("in UTC" if distance == "Z" else "clock in") in note for note in series.notes] == (
        [True] if distance else []
    )


def test_distances_to_utc_that_change_are_refused_in_text():
    with pytest.raises(DataError, match="distance to UTC changes"):
        to_seconds(np.array(["2012-03-01T00:00+01:00", "2012-03-01T00:05+02:00"]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.array(["01/03/2012 00:00"]), "not all in ISO 8601.*01/03/2012"),
        (np.arange(5), "whole numbers, the first 0"),
        (np.linspace(0, 1, 5), "of type float64; expected datetime64"),
    ],
)
def test_what_is_no_time_is_refused(raw, message):
    with pytest.raises(DataError, match=message):
        to_seconds(raw)


def test_what_else_is_in_an_archive_does_not_matter(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, speed=np.ones((2, 3)), timestamps=TIMES, objects=np.array([{}, {}]))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "not an array")
    arrays = read_npz(path)
    assert arrays.keys() == {"speed", "timestamps"}
    assert arrays.notes == ("read speed, left objects; data.key names another",)
