"""The graph of the shipped METR-LA file, written in every format and read back the same."""

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import expt.jobs.traffic.adjacency as module
from expt.errors import DataError
from expt.jobs.traffic.adjacency import read_adjacency
from expt.jobs.traffic.reading import read_series

FILES = Path(module.__file__).parent / "files"


@pytest.fixture(scope="module")
def graph():
    with np.load(FILES / "metr_la_29.npz") as file:
        return file["adjacency"], file["sensor_ids"].tolist()


def dcrnn(matrix, ids, id_to_index=None):
    return [ids, id_to_index or {name: row for row, name in enumerate(ids)}, matrix]


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("container", [list, tuple])
def test_dcrnns_pickle_is_read(graph, tmp_path, container):
    path = write_pickle(tmp_path / "adj_mx.pkl", container(dcrnn(*graph)))
    matrix, ids = read_adjacency(path)
    np.testing.assert_array_equal(matrix, graph[0])
    assert matrix.dtype == np.float32
    assert np.count_nonzero(matrix) == 181
    assert ids == tuple(graph[1])


def test_a_bare_matrix_is_read(graph, tmp_path):
    matrix, ids = read_adjacency(write_pickle(tmp_path / "x.pkl", graph[0].astype(np.float64)))
    np.testing.assert_array_equal(matrix, graph[0])
    assert (matrix.dtype, ids) == (np.float32, None)


@pytest.mark.parametrize("key", ["adjacency", "anything"])
@pytest.mark.parametrize("named", [True, False])
def test_an_npz_is_read(graph, tmp_path, key, named):
    extra = {"sensor_ids": graph[1]} if named else {}
    np.savez(tmp_path / "x.npz", **{key: graph[0], **extra})
    matrix, ids = read_adjacency(tmp_path / "x.npz")
    np.testing.assert_array_equal(matrix, graph[0])
    assert ids == (tuple(graph[1]) if named else None)


def test_the_graph_of_a_series_file_is_read(graph):
    matrix, ids = read_adjacency(FILES / "metr_la_29.npz")
    np.testing.assert_array_equal(matrix, graph[0])
    assert ids == tuple(graph[1])


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
def test_a_sparse_matrix_is_read(graph, tmp_path, kind):
    sparse = getattr(scipy.sparse, f"{kind}_matrix")(graph[0])
    scipy.sparse.save_npz(tmp_path / "x.npz", sparse)
    write_pickle(tmp_path / "alone.pkl", sparse)
    write_pickle(tmp_path / "dcrnn.pkl", dcrnn(sparse, graph[1]))
    for name, expected in {"x.npz": None, "alone.pkl": None, "dcrnn.pkl": tuple(graph[1])}.items():
        matrix, ids = read_adjacency(tmp_path / name)
        np.testing.assert_array_equal(matrix, graph[0])
        assert (matrix.dtype, ids) == (np.float32, expected)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("index", [True, False])
def test_a_csv_is_read_with_or_without_ids(graph, tmp_path, header, index):
    frame = pd.DataFrame(graph[0], index=graph[1], columns=graph[1])
    frame.to_csv(tmp_path / "x.csv", header=header, index=index)
    matrix, ids = read_adjacency(tmp_path / "x.csv")
    np.testing.assert_array_equal(matrix, graph[0])
    assert matrix.dtype == np.float32
    assert ids == (tuple(graph[1]) if header or index else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,x\n0,1\n", "row 0, column 1 .* is 'x', which is not a number"),
        (",a,b\na,1,0\nc,0,1\n", "name different sensors, or in another order"),
        ("from,to,cost\n" + "1,2,0.5\n" * 5, r"shape \(6, 3\); expected N x N. A list of edges"),
        ("from,to,cost\n" + "1,2,0.5\n" * 3, "expected N x N. A list of edges"),
        ("from,to,cost\n" + "1,2,0.5\n" * 2, "expected N x N. A list of edges"),
        (",From Node,To_ID,w\n" + "0,1,2,0.5\n" * 3, "expected N x N. A list of edges"),
        ("1,0\n0\n1,1,1\n", "cannot be read as CSV"),
        ("0,0,1\n0,1,0\n", "names 1 different sensors for a matrix of 2"),
        ("1,0,0,0\n0,1,0,0\n", r"shape \(2, 4\)"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        read_adjacency(path)


EDGES = "0,1,0.5\n1,2,0.3\n2,0,1\n"


@pytest.mark.parametrize(
    "text",
    [
        EDGES,
        "i,j,w\n" + EDGES,
        "From Sensor-ID,To Sensor-ID,w\n" + EDGES,
        "u,v,w\n" + EDGES.replace("0,", "a,").replace("1,", "b,").replace("2,", "c,"),
    ],
)
def test_three_edges_are_no_matrix(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    for sensors in ((), ("0", "1", "2")):
        with pytest.raises(DataError, match=r"expected N x N. A list of edges"):
            read_adjacency(tmp_path / "x.csv", sensors)


@pytest.mark.parametrize(
    "rows",
    ["0,1,0\n1,0,1\n0,1,0\n", "1,1,0\n1,1,1\n0,1,1\n", "0,900,50\n900,0,7\n50,7,0\n",
     "1,0.5,0\n0.5,1,0.2\n0,0.2,1\n", "1.0,0.0,0.4\n0.0,1.0,0.0\n0.4,0.0,1.0\n"],
)  # fmt: skip
@pytest.mark.parametrize("header", ["", "From A,To B,x\n"])
def test_a_matrix_of_three_sensors_is_no_list_of_edges(tmp_path, rows, header):
    (tmp_path / "x.csv").write_text(header + rows)
    assert read_adjacency(tmp_path / "x.csv")[0].shape == (3, 3)


def test_a_matrix_with_ids_at_both_sides_is_no_list_of_edges(tmp_path):
    (tmp_path / "x.csv").write_text(",a,b,c\na,1,0,1\nb,2,1,2\nc,3,2,0\n")
    assert read_adjacency(tmp_path / "x.csv")[1] == ("a", "b", "c")


def test_a_header_of_the_series_sensors_is_that_of_a_matrix(tmp_path):
    (tmp_path / "x.csv").write_text("i,j,w\n1,0,1\n2,1,2\n3,2,0\n")
    times = ["2024-01-01 00:00", "2024-01-01 00:05", "2024-01-01 00:10"]
    table = pd.DataFrame({"time": times, "j": 50.5, "i": 40.5, "w": 30.5})
    table.to_csv(tmp_path / "speed.csv", index=False)
    series = read_series(tmp_path / "speed.csv", tmp_path / "x.csv")
    np.testing.assert_array_equal(series.adjacency, [[1, 2, 2], [0, 1, 1], [2, 3, 0]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "holds a dict; expected a matrix or"),
        ([1, 2], "holds a list of int, int; expected"),
        ([["a"], {"a": 0}, [[1.0]]], "holds a list of list, dict, list; expected"),
        (dcrnn(np.eye(2), ["a", "b"], {"a": 1, "b": 0}), "disagree on the order"),
        (dcrnn(np.eye(2), ["a", "b", "c"]), "names 3 different sensors for a matrix of 2"),
        (np.ones((2, 3)), r"shape \(2, 3\); expected N x N"),
        (np.ones((0, 0)), r"shape \(0, 0\)"),
        (np.array([["a"]]), "adjacency's entries are not numbers"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    path = write_pickle(tmp_path / "x.pkl", content)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        read_adjacency(path)


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_not_run(graph, tmp_path):
    mark = tmp_path / "mark"
    content = [*dcrnn(*graph), Payload(f"touch {mark}")]
    path = write_pickle(tmp_path / "adj.pkl", content)
    with pytest.raises(DataError, match=r"adj.pkl: is a pickle with anything but arrays.*system"):
        read_adjacency(path)
    assert not mark.exists()


def test_ids_as_python_objects_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", adjacency=np.eye(2), sensor_ids=np.array(["a", "b"], object))
    with pytest.raises(DataError, match=r"sensor_ids holds Python objects.*sensor_ids.astype\(str"):
        read_adjacency(tmp_path / "x.npz")


def test_an_npz_without_a_graph_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", speed=np.ones(2), values=np.ones(2))
    with pytest.raises(DataError, match="has no adjacency; found speed, values"):
        read_adjacency(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.pkl", "no such file"),
        ("folder.pkl", "is a directory"),
        ("empty.pkl", "is empty"),
        ("graph.mat", "unknown suffix '.mat'; expected one of .csv, .npz, .pkl"),
        ("text.pkl", "cannot be read as a pickle"),
        ("text.npz", "cannot be read as a NumPy archive"),
    ],
)
def test_what_is_no_graph_file_is_refused(tmp_path, name, message):
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "empty.pkl").touch()
    for other in ("graph.mat", "text.pkl", "text.npz"):
        (tmp_path / other).write_text("hello")
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read_adjacency(tmp_path / name)


IDS = ["773869", "767541", "767542"]


def with_series(folder, text):
    table = pd.DataFrame(
        {"time": ["2024-01-01 00:00", "2024-01-01 00:05"], **dict.fromkeys(IDS, 9.5)}
    )
    table.to_csv(folder / "speed.csv", index=False)
    (folder / "x.csv").write_text(text)
    return read_series(folder / "speed.csv", folder / "x.csv").adjacency


@pytest.mark.parametrize("cells", ["{},{},0.5", "{},{},1.5,0.7"])
def test_edges_are_known_by_the_ids_of_the_series(tmp_path, cells):
    pairs = zip(IDS, IDS[1:] + IDS[:1], strict=True)
    with pytest.raises(DataError, match="A list of edges"):
        with_series(tmp_path, "\n".join(cells.format(*pair) for pair in pairs))


@pytest.mark.parametrize(
    "text",
    [
        "1,2,0\n2,1,3\n0,3,1\n",
        "0,1,2\n1,2,0\n2,1,3\n0,3,1\n",
        ",0,1,2\n0,1,2,0\n1,2,1,3\n2,0,3,1\n",
        "773869,1,2,0\n767541,2,1,3\n767542,0,3,1\n",
        ", 773869, 767541, 767542\n773869, 1, 2, 0\n767541, 2, 1, 3\n767542, 0, 3, 1\n",
    ],
)
def test_a_matrix_of_whole_weights_is_read(tmp_path, text):
    np.testing.assert_array_equal(with_series(tmp_path, text), [[1, 2, 0], [2, 1, 3], [0, 3, 1]])


@pytest.mark.parametrize("separator", [";", " ", "\t"])
def test_other_separators_of_a_matrix_are_named(tmp_path, separator):
    with pytest.raises(DataError, match="columns are separated by"):
        with_series(tmp_path, "1,0,0\n0,1,0\n0,0,1\n".replace(",", separator))


def test_a_distance_that_is_written_like_an_id_makes_no_list_of_edges(tmp_path):
    text = "0,773869,1200\n773869,0,900\n1200,900,0\n"
    assert with_series(tmp_path, text)[0, 1] == 773869
