"""CSV files as spreadsheets and other countries write them."""

import numpy as np
import pytest

from expt.errors import DataError
from expt.jobs.traffic.adjacency import read_adjacency
from expt.jobs.traffic.reading import read_series

ROWS = ["2012-03-01 00:00:00,60.5,", "2012-03-01 00:05:00,61,62.25"]
TEXT = "\n".join(["timestamp,Brücke,767541", *ROWS]) + "\n"


def saved(folder, text, encoding="utf-8"):
    path = folder / "speed.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_unicode_is_read_however_it_is_written(tmp_path, encoding):
    series = read_series(saved(tmp_path, TEXT, encoding))
    assert series.sensor_ids == ("Brücke", "767541")
    np.testing.assert_array_equal(series.values, np.float32([[60.5, 0], [61, 62.25]]))


@pytest.mark.parametrize("line", [0, 2])
def test_another_encoding_is_named_with_what_to_do(tmp_path, line):
    lines = TEXT.replace("Brücke", "a").splitlines()
    lines[line] = lines[line].replace("0", "ü", 1) if line else "timestamp,Brücke,767541"
    with pytest.raises(DataError) as refused:
        read_series(saved(tmp_path, "\n".join(lines), "latin-1"))
    message = str(refused.value)
    assert f"another encoding than UTF-8, with the byte 0xfc in line {line + 1}" in message
    assert "Latin-1" in message and "ü" in message and "iconv -f latin1 -t utf-8" in message
    assert "damaged" not in message and "download" not in message


def test_what_is_no_text_is_not_taken_for_an_encoding(tmp_path):
    (tmp_path / "speed.csv").write_bytes(b"time,a\n" + bytes([0x81, 0, 1, 2, 0xFF]) * 9)
    with pytest.raises(DataError, match="damaged"):
        read_series(tmp_path / "speed.csv")


@pytest.mark.parametrize("commas", [",", ",,", ", "])
@pytest.mark.parametrize("where", ["all", "rows", "header"])
def test_trailing_commas_make_no_sensor(tmp_path, commas, where):
    lines = TEXT.splitlines()
    first = 1 if where == "rows" else 0
    last = 1 if where == "header" else len(lines)
    lines[first:last] = [line + commas for line in lines[first:last]]
    series = read_series(saved(tmp_path, "\n".join(lines)))
    assert series.sensor_ids == ("Brücke", "767541")
    np.testing.assert_array_equal(series.values, np.float32([[60.5, 0], [61, 62.25]]))


def test_a_comma_too_many_in_one_row_is_found(tmp_path):
    with pytest.raises(DataError, match=r"in line 3, saw 4.*look at that line for a comma") as e:
        read_series(saved(tmp_path, TEXT.rstrip() + ",\n"))
    assert "download" not in str(e.value)


def test_cells_without_a_name_are_not_dropped(tmp_path):
    with pytest.raises(DataError, match=r"header names 3 columns, .* the first row has 4"):
        read_series(saved(tmp_path, "\n".join(["t,a,b", *[row + ",9" for row in ROWS]])))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_graph_is_read_alike(tmp_path, encoding):
    matrix, ids = read_adjacency(saved(tmp_path, ",ä,b,\nä,1,0.5,\nb,0,1,\n", encoding))
    np.testing.assert_array_equal(matrix, np.float32([[1, 0.5], [0, 1]]))
    assert ids == ("ä", "b")
    with pytest.raises(DataError, match="another encoding than UTF-8"):
        read_adjacency(saved(tmp_path, "ä,b\n1,0\n0,1\n", "latin-1"))
