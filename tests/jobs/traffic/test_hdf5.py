"""The layout is the one pandas and PyTables write; PyTables itself is not needed."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

import expt.jobs.traffic.hdf5 as module
from expt.errors import DataError
from expt.jobs.traffic.choice import Choice
from expt.jobs.traffic.hdf5 import read_hdf5
from expt.jobs.traffic.reading import read_series

TIMES = np.datetime64("2012-03-01", "s") + 300 * np.arange(5)
WEEK = Path(module.__file__).parent / "files" / "metr_la_week.npz"


@pytest.fixture(scope="module")
def week():
    with np.load(WEEK) as file:
        return {name: file[name] for name in ("speed", "timestamps", "sensor_ids")}


def write_array(group, key, array, /, **attributes):
    node = group.create_dataset(key, data=array)
    node.attrs["CLASS"] = np.bytes_("ARRAY")
    node.attrs["TITLE"] = np.bytes_("")
    node.attrs["VERSION"] = np.bytes_("2.4")
    node.attrs["FLAVOR"] = np.bytes_("numpy")
    node.attrs["transposed"] = np.bool_(True)
    for name, value in attributes.items():
        if value is None:  # PyTables pickles what is no HDF5 type
            node.attrs[name] = np.bytes_(pickle.dumps(None, 0))
        else:
            node.attrs[name] = np.bytes_(value)


def write_frame(path, speed, timestamps, ids, *, kind="datetime64", blocks=None, id_kind="string"):
    """Write what `frame.to_hdf(path, key="df", format="fixed")` writes."""
    blocks = blocks or [np.arange(len(ids))]
    unit = kind.removeprefix("datetime64") or "[ns]"
    with h5py.File(path, "w") as file:
        file.attrs["PYTABLES_FORMAT_VERSION"] = np.bytes_("2.1")
        group = file.create_group("df")
        group.attrs["CLASS"] = np.bytes_("GROUP")
        group.attrs["pandas_type"] = np.bytes_("frame")
        group.attrs["encoding"] = np.bytes_("UTF-8")
        group.attrs["ndim"], group.attrs["nblocks"] = 2, len(blocks)
        names = ["axis0", "axis1", *(f"block{i}_items" for i in range(len(blocks)))]
        for name in names:
            group.attrs[f"{name}_variety"] = np.bytes_("regular")
        write_array(group, "axis0", ids, kind=id_kind, name=None)
        steps = timestamps.astype(f"datetime64{unit}").view(np.int64)
        index = {"index_class": "datetime", "freq": None, "kind": kind, "name": None}
        write_array(group, "axis1", steps, **index)
        for block, columns in enumerate(blocks):
            write_array(group, f"block{block}_items", ids[columns], kind=id_kind, name=None)
            write_array(group, f"block{block}_values", speed[:, columns])
    return path


@pytest.mark.parametrize(
    "kind", ["datetime64", "datetime64[ns]", "datetime64[us]", "datetime64[s]"]
)
@pytest.mark.parametrize(("ids", "id_kind"), [("S6", "string"), ("i8", "integer")])
def test_a_pandas_frame_is_read(week, tmp_path, kind, ids, id_kind):
    names = week["sensor_ids"].astype(ids)
    speed = week["speed"].astype(np.float64)
    path = tmp_path / "metr-la.h5"
    write_frame(path, speed, week["timestamps"], names, kind=kind, id_kind=id_kind)
    series = read_series(path)
    np.testing.assert_array_equal(series.values, week["speed"])
    np.testing.assert_array_equal(series.timestamps, week["timestamps"])
    assert series.sensor_ids == tuple(week["sensor_ids"].tolist())
    assert series.fingerprint() == read_series(WEEK).fingerprint()


def test_blocks_are_put_in_the_order_of_the_columns(week, tmp_path):
    names = week["sensor_ids"].astype("S6")
    blocks = [np.arange(1, 207, 2), np.arange(0, 207, 2)]
    path = tmp_path / "two.h5"
    write_frame(path, week["speed"], week["timestamps"], names, blocks=blocks)
    np.testing.assert_array_equal(read_hdf5(path)["speed"], week["speed"])


def test_old_integers_of_another_unit_are_recognised(week, tmp_path):
    path = tmp_path / "us.h5"
    write_frame(path, week["speed"], week["timestamps"], week["sensor_ids"].astype("S6"))
    with h5py.File(path, "r+") as file:
        file["df/axis1"][...] = file["df/axis1"][()] // 1000
    np.testing.assert_array_equal(read_hdf5(path)["timestamps"], week["timestamps"])


def damage_times(group):
    group["axis1"].attrs["kind"] = np.bytes_("integer")


def damage_zone(group):
    group["axis1"].attrs["tz"] = np.bytes_("Mars/Olympus_Mons")


def damage_names(group):
    group["axis0"].attrs["kind"] = np.bytes_("object")


def damage_values(group):
    del group["block0_values"]
    group["block0_values"] = np.ones((5, 3))


def damage_items(group):
    group["block0_items"][0] = b"nobody"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_times, "has no timestamps: the row index /df/axis1 is of kind integer"),
        (damage_zone, "tz_localize"),
        (damage_names, "axis0 holds pickled column names"),
        (damage_values, r"block0_values of /df holds float64 of shape \(5, 3\)"),
        (damage_items, "block0_items names 'nobody'"),
    ],
)
def test_a_damaged_frame_is_refused(week, tmp_path, damage, message):
    path = tmp_path / "damaged.h5"
    write_frame(path, week["speed"], week["timestamps"], week["sensor_ids"].astype("S6"))
    with h5py.File(path, "r+") as file:
        damage(file["df"])
    with pytest.raises(DataError, match=message):
        read_hdf5(path)


@pytest.mark.parametrize(("rows", "message"), [(0, "0 time steps"), (5, "row 0 is empty")])
def test_frames_without_rows_or_a_first_time_are_refused(tmp_path, rows, message):
    times = TIMES[:rows].copy()
    times[:1] = "NaT"
    ids = np.array(["a", "b"], "S1")
    path = write_frame(tmp_path / "x.h5", np.ones((rows, 2)), times, ids)
    with pytest.raises(DataError, match=message):
        read_series(path)


def test_speeds_beyond_float32_are_refused(week, tmp_path):
    speed = week["speed"].astype(np.float64)
    speed[1, 2] = 1e300
    path = tmp_path / "large.h5"
    write_frame(path, speed, week["timestamps"], week["sensor_ids"].astype("S6"))
    with pytest.raises(DataError, match="1 speeds are not finite"):
        read_series(path)


def test_plain_arrays_in_a_group_are_read(week, tmp_path):
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["run/values"] = week["speed"]
        file["run/timestamps"] = np.datetime_as_string(week["timestamps"]).astype("S")
    arrays = read_hdf5(tmp_path / "plain.h5")
    np.testing.assert_array_equal(arrays["speed"], week["speed"])
    series = read_series(tmp_path / "plain.h5")
    np.testing.assert_array_equal(series.timestamps, week["timestamps"])


def test_plain_arrays_without_times_are_refused(week, tmp_path):
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["speed"] = week["speed"]
    with pytest.raises(DataError, match="has no timestamps; found speed"):
        read_hdf5(tmp_path / "plain.h5")


def test_a_group_in_place_of_an_array_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_group("speed")
        file["timestamps"] = np.arange(4)
    with pytest.raises(DataError, match="/speed is not an array"):
        read_hdf5(tmp_path / "x.h5")


def test_a_compression_that_needs_a_plug_in_is_named(tmp_path):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((4,))
    creation.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())  # Blosc, as pandas' complib="blosc"
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple((4,))
        h5py.h5d.create(file.id, b"speed", h5py.h5t.IEEE_F32LE, space, creation)
        file["timestamps"] = np.arange(4)
    with pytest.raises(DataError, match=r"/speed is compressed with .*needs a plug-in"):
        read_hdf5(tmp_path / "x.h5")


def test_another_layout_is_refused_with_what_was_found(tmp_path):
    with h5py.File(tmp_path / "table.h5", "w") as file:
        file["df/table"] = np.ones(3)
    with pytest.raises(DataError, match=r'found df/table\..*format="fixed"'):
        read_hdf5(tmp_path / "table.h5")


def test_a_long_frame_is_made_wide(tmp_path):
    times = np.repeat(np.datetime64("2017-01-01", "s") + 300 * np.arange(30), 2)
    sensors = np.tile([1_100_000_001, 1_100_000_002], 30)  # float32 cannot tell them apart
    cells = np.stack([sensors, np.arange(60) + 1], axis=1).astype(np.float64)
    names = np.array(["station", "avg_speed"], dtype="S9")
    path = write_frame(tmp_path / "long.h5", cells, times, names)
    series = read_series(path)
    assert series.sensor_ids == ("1100000001", "1100000002")
    np.testing.assert_array_equal(series.values, np.float32(np.arange(60) + 1).reshape(30, 2))
    with h5py.File(path, "r+") as file:
        file["df/axis1"].attrs["kind"] = np.bytes_("integer")
    with pytest.raises(DataError, match=r"the row index /df/axis1 is of kind integer"):
        read_hdf5(path)


def write_beside(path, name, **options):
    """Add a frame of another name to a file."""
    other = write_frame(path.with_name("other.h5"), **options)
    with h5py.File(other) as source, h5py.File(path, "a") as file:
        source.copy("df", file, name=name)


def test_of_several_frames_that_of_speeds_is_read(week, tmp_path):
    path, ids = tmp_path / "several.h5", week["sensor_ids"].astype("S6")
    given = {"timestamps": week["timestamps"], "ids": ids}
    write_beside(path, "2012/flow", speed=week["speed"] * 9, **given)
    write_beside(path, "2012/speed", speed=week["speed"], **given)
    write_beside(path, "a_meta", speed=week["speed"][:5], **{**given, "timestamps": TIMES})
    with h5py.File(path, "r+") as file:
        file["a_meta/axis1"].attrs["kind"] = np.bytes_("integer")
    arrays = read_hdf5(path)
    np.testing.assert_array_equal(arrays["speed"], week["speed"])
    assert arrays.notes == ("read /2012/speed, left /2012/flow, /a_meta; data.key names another",)
    for key in ("flow", "2012/flow", "/2012/flow"):
        other = read_hdf5(path, Choice(key=key))
        np.testing.assert_array_equal(other["speed"], week["speed"] * 9)
    with pytest.raises(DataError, match=r"data.key=x: .* found /2012/speed, /2012/flow, /a_meta"):
        read_hdf5(path, Choice(key="x"))
    with pytest.raises(DataError, match="index /a_meta/axis1 is of kind integer"):
        read_hdf5(path, Choice(key="a_meta"))
    with h5py.File(path, "r+") as file:
        del file["2012"]
    with pytest.raises(DataError, match="index /a_meta/axis1 is of kind integer"):
        read_hdf5(path)


def test_a_name_further_up_counts_too(week, tmp_path):
    path, ids = tmp_path / "years.h5", week["sensor_ids"].astype("S6")
    given = {"timestamps": week["timestamps"], "ids": ids}
    for place, quantity in enumerate(("flow", "meta", "speed")):
        write_beside(path, f"{quantity}/y2012", speed=week["speed"] * (3 - place), **given)
    np.testing.assert_array_equal(read_hdf5(path)["speed"], week["speed"])
    other = read_hdf5(path, Choice(key="flow"))
    np.testing.assert_array_equal(other["speed"], week["speed"] * 3)
    with h5py.File(path, "r+") as file:
        del file["speed"]
        file.move("flow", "zzz")
    assert read_hdf5(path).notes[0].startswith("read /zzz/y2012, left /meta/y2012")
