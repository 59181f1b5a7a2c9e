import collections
import os
import pickle
import subprocess
import typing

import numpy as np
import pytest
import scipy.sparse

from expt.errors import DataError
from expt.jobs.traffic.adjacency import read_adjacency
from expt.jobs.traffic.array_pickle import load_array_pickle
from expt.jobs.traffic.sparse import to_dense

MATRIX = np.arange(9, dtype=np.float32).reshape(3, 3)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's `str`, booleans in a dtype as integers."""

    dispatch: typing.ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    def save_text(self, text):
        self.save_bytes(text.encode("latin1"))

    def save_truth(self, truth):
        self.save_long(int(truth))

    def save_array(self, array):
        reconstruct, arguments, state = array.__reduce__()
        self.save_reduce(reconstruct, arguments, state, obj=array)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text
    dispatch[bool] = save_truth
    dispatch[np.ndarray] = save_array


def python2_pickle(path, content):
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    written = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(written)
    return path


def test_an_array_from_python_2_is_read(tmp_path):
    path = python2_pickle(tmp_path / "adj.pkl", [["773869"], {"773869": 0}, MATRIX])
    assert b"_codecs" not in path.read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in path.read_bytes()
    ids, index, matrix = load_array_pickle(path)
    assert (ids, index) == (["773869"], {"773869": 0})
    np.testing.assert_array_equal(matrix, MATRIX)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_scalars_of_every_protocol_are_read(tmp_path, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"matrix": MATRIX, "scalar": np.float64(0.5)}, protocol))
    content = load_array_pickle(path)
    np.testing.assert_array_equal(content["matrix"], MATRIX)
    assert content["scalar"] == 0.5


def test_byte_order_memory_order_and_text_are_kept(tmp_path):
    content = [
        MATRIX.astype(">f4"),
        np.asfortranarray(MATRIX),
        np.array(["773869", "é"]),
        np.array([b"ab"]),
        np.zeros((0, 3), dtype=bool),
    ]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    for written, read in zip(content, load_array_pickle(tmp_path / "x.pkl"), strict=True):
        np.testing.assert_array_equal(read, written)
        assert read.dtype == written.dtype
        assert read.flags.writeable


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_matrix", "dia_array"])
def test_a_sparse_matrix_comes_as_its_parts(tmp_path, kind, protocol):
    content = [getattr(scipy.sparse, kind)(MATRIX)]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    (read,) = load_array_pickle(tmp_path / "x.pkl")
    np.testing.assert_array_equal(to_dense(read.parts), MATRIX)


def test_a_sparse_matrix_without_its_parts_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02cscipy.sparse._csr\ncsr_matrix\n)\x81.")
    with pytest.raises(DataError, match="sparse matrix of format ''"):
        read_adjacency(tmp_path / "x.pkl")


def test_a_sparse_matrix_of_an_older_scipy_is_read(tmp_path):
    written = pickle.dumps(scipy.sparse.csr_matrix(MATRIX), 2)
    older = written.replace(b"scipy.sparse._csr", b"scipy.sparse.csr")
    assert older != written
    (tmp_path / "x.pkl").write_bytes(older)
    np.testing.assert_array_equal(to_dense(load_array_pickle(tmp_path / "x.pkl").parts), MATRIX)


@pytest.mark.parametrize("array", [np.array([{}]), np.zeros(2, dtype="i4,f4"), np.void(b"a")])
def test_arrays_of_other_types_are_refused(tmp_path, array):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(array))
    with pytest.raises(DataError, match=r"holds an array of type [OV].*expected numbers or text"):
        load_array_pickle(tmp_path / "x.pkl")


def test_flags_of_a_dtype_are_not_taken_from_the_file(tmp_path):
    written = pickle.dumps(MATRIX, 2)
    end = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # fields, sizes and flags of the dtype
    assert written.count(end) == 1
    has_object = end[:-2] + b"\x3ft"  # NumPy would take the floats for pointers
    (tmp_path / "x.pkl").write_bytes(written.replace(end, has_object))
    read = load_array_pickle(tmp_path / "x.pkl")
    np.testing.assert_array_equal(read, MATRIX)
    assert not read.dtype.hasobject


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_is_refused_and_not_run(tmp_path, protocol):
    mark = tmp_path / "mark"
    command = f"touch {mark}"
    payloads = {
        "system": Payload(os.system, command),
        "check_output": Payload(subprocess.check_output, ["touch", str(mark)]),
        "eval": Payload(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
    }
    for name, payload in payloads.items():
        path = tmp_path / "evil.pkl"
        path.write_bytes(pickle.dumps([MATRIX, payload], protocol))
        with pytest.raises(DataError, match=r"pickle with anything but arrays.*refused") as caught:
            load_array_pickle(path)
        assert name in str(caught.value)
        assert not mark.exists()
        pickle.loads(path.read_bytes())  # the payload does work where nothing restrains it
        assert mark.exists()
        mark.unlink()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (np.random.default_rng, "numpy.random"),
        (np.load, "numpy.*load"),
        (scipy.sparse.lil_matrix(MATRIX), "scipy.sparse._lil.lil_matrix"),
        (scipy.sparse.load_npz, "scipy.sparse.*load_npz"),
    ],
)
def test_other_globals_are_refused_by_name(tmp_path, content, name):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"asks for {name}"):
        load_array_pickle(tmp_path / "x.pkl")


def test_a_dotted_name_does_not_reach_through_an_admitted_one(tmp_path):
    attack = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    (tmp_path / "x.pkl").write_bytes(attack)
    with pytest.raises(DataError, match=r"asks for numpy.ndarray.tofile"):
        load_array_pickle(tmp_path / "x.pkl")


def test_an_outside_object_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"Psecret\n.")
    with pytest.raises(DataError, match="outside object, 'secret'"):
        load_array_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "damaged",
    [
        b"hello",
        b"\x80\x02",
        b"\x80\x63.",
        pickle.dumps(MATRIX)[:-9],
        pickle.dumps(MATRIX, 2)[:60],
        b"\x80\x02cnumpy\ndtype\nK\x03\x85R.",
        b"\x80\x02h\x07.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02cnumpy\nndarray\nK\x03\x85R.",
        pickle.dumps(MATRIX, 2).replace(b"cnumpy\ndtype\n", b"c__builtin__\nobject\n"),
        pickle.dumps(np.float64(1), 2).replace(b"cnumpy\ndtype\n", b"c__builtin__\nobject\n"),
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.",
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path, damaged):
    (tmp_path / "x.pkl").write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as a pickle"):
        load_array_pickle(tmp_path / "x.pkl")
