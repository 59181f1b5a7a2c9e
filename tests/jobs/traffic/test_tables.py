import datetime

import numpy as np
import pandas as pd
import pytest

from expt.errors import DataError
from expt.jobs.traffic.reading import read_series
from expt.jobs.traffic.tables import read_csv, read_parquet

TIMES = np.array(["2012-03-01T00:00:00", "2012-03-01T00:05:00"], dtype="datetime64[s]")
GOOD = "timestamp,773869,767541\n2012-03-01 00:00:00,60.5,\n2012-03-01 00:05:00,61,62.25\n"


def write_csv(folder, text):
    path = folder / "speed.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\ufeff" + GOOD,
        "\n" + GOOD,
        "\r\n  \r\n" + GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("60.5,\n", "60.5,NaN\n"),
        GOOD.replace("timestamp", ""),
        GOOD.replace(" 00:", "T00:"),
        GOOD.replace(",60.5", "-08:00,60.5").replace(",61", "-08:00,61"),
    ],
)
def test_a_csv_is_read(tmp_path, text):
    series = read_series(write_csv(tmp_path, text))
    np.testing.assert_array_equal(series.values, np.float32([[60.5, 0], [61, 62.25]]))
    np.testing.assert_array_equal(series.timestamps, TIMES)
    assert series.sensor_ids == ("773869", "767541")


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_lines_may_end_in_any_way(tmp_path, end):
    text = ("\n\n" + GOOD).replace("\n", end)
    (tmp_path / "x.csv").write_bytes(text.encode())
    np.testing.assert_array_equal(read_series(tmp_path / "x.csv").timestamps, TIMES)


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz"])
def test_times_since_1970_are_read_in_every_format(tmp_path, unit, kind, suffix):
    path, times = tmp_path / f"x.{suffix}", TIMES.astype(f"M8[{unit}]").astype(kind)
    table = pd.DataFrame({"timestamp": times, "773869": [60.5, 61]})
    if suffix == "npz":
        np.savez(path, speed=table[["773869"]], timestamps=times)
    else:
        table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    series = read_series(path)
    np.testing.assert_array_equal(series.timestamps, TIMES)
    assert series.values.shape == (2, 1)


@pytest.mark.parametrize("first", [0, 1])
def test_row_numbers_in_front_are_no_times(tmp_path, first):
    lines = [f"{number},{line}" for number, line in enumerate(GOOD.splitlines(), first - 1)]
    path = write_csv(tmp_path, "\n".join(['"",' + GOOD.splitlines()[0], *lines[1:]]))
    assert read_series(path).sensor_ids == ("773869", "767541")


HEADER = GOOD.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "773869,767541\n60.5,61\n62,63\n",
            "no timestamp column; found 773869, 767541; .*data.step_minutes$",
        ),
        ("a,b\nx,61\ny,63\n", "no timestamp column; found a, b; expected times"),
        (GOOD.replace("2012-03-01 00:05:00", "01/03/2012 00:05"), "row 1 .*01/03/2012 00:05"),
        (GOOD.replace("2012-03-01 00:05:00", ""), "row 1 .* is nan"),
        (GOOD.split("\n", 1)[1], "has no header: .* the time '2012-03-01 00:00:00'"),
        (HEADER + "\n", "has a header but no rows"),
        (GOOD.replace(",", ";"), "columns are separated by ';': .*'timestamp;773869;.* commas"),
        (GOOD.replace(",", ";").replace(".", ","), "columns are separated by ';'"),
        (GOOD.replace(",", "\t"), r"columns are separated by '\\t'"),
        ("timestamp,773869\n2012-03-01,1,2\n", "header names 2 columns, .* the first row has 3"),
        (GOOD.replace("61,", "fast,"), "column '773869' holds 'fast' at 2012-03-01T00:05:00"),
        (GOOD.replace("61,", "True,").replace("60.5", "False"), "column '773869' holds .*False"),
        (GOOD.replace("61,", "inf,"), "not finite"),
        (GOOD.replace("61,", "1e300,"), "not finite"),
        (GOOD.replace("61,", "-61,"), "negative"),
        (GOOD.replace("767541", "773869"), "two columns are called '773869'"),
        ("timestamp\n2012-03-01 00:00\n2012-03-01 00:05\n", "no sensor"),
        (GOOD + "2012-03-01 00:10:00,1,2,3,4\n", "cannot be read as CSV .*ParserError"),
        (GOOD + "2012-03-01 00:05:00,1,2\n", "time steps not increasing: row 2"),
        (
            GOOD.replace(",60.5", "-08:00,60.5").replace(",61", "-07:00,61"),
            "times in 'timestamp' cannot be read",
        ),
        ("\n\n", "cannot be read as CSV"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, text, message):
    path = write_csv(tmp_path, text)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        read_series(path)


def test_a_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "speed.csv").write_bytes(GOOD.replace("timestamp", "zeit ä").encode("latin1"))
    with pytest.raises(DataError, match=r"cannot be read as CSV .*UnicodeDecodeError"):
        read_csv(tmp_path / "speed.csv")


def frame(**columns):
    return pd.DataFrame({"773869": [60.5, 61], "767541": [np.nan, 62.25], **columns})


@pytest.mark.parametrize(
    "table",
    [
        frame().set_index(pd.DatetimeIndex(TIMES)),
        frame().set_index(pd.DatetimeIndex(TIMES, name="time")),
        frame().set_index(pd.DatetimeIndex(TIMES).tz_localize("America/Los_Angeles")),
        frame(time=TIMES.astype("datetime64[ns]")),
        frame(time=TIMES)[["773869", "time", "767541"]],
        frame(time=TIMES).astype({"767541": "Float32"}),
        frame(time=TIMES).set_index(pd.Index([7, 9], name="record")),
        frame(time=TIMES, day=[datetime.date(2012, 3, 1)] * 2),
        frame().set_index(pd.Index(TIMES.astype(int), name="timestamp")),
    ],
)
def test_a_parquet_table_is_read(tmp_path, table):
    table.to_parquet(tmp_path / "speed.parquet")
    series = read_series(tmp_path / "speed.parquet")
    np.testing.assert_array_equal(series.values, np.float32([[60.5, 0], [61, 62.25]]))
    np.testing.assert_array_equal(series.timestamps, TIMES)
    assert series.sensor_ids == ("773869", "767541")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (frame(), "has no timestamp column; found 773869, 767541; expected times"),
        (frame(time=TIMES, road=["a", "b"]), "column 'road' holds 'a' at 2012-03-01T00:00:00"),
        (frame(time=TIMES, ok=[True, False]), "column 'ok' holds .*True"),
        (
            frame(time=TIMES, then=TIMES[::-1] + 86_400),
            "several columns of times.*; then, ",
        ),
        (
            frame(time=TIMES, day=[datetime.date(2012, 3, 2)] * 2),
            "several columns of times.*; day, ",
        ),
        (frame(time=TIMES[::-1]), "time steps not increasing"),
    ],
)
def test_a_bad_parquet_table_is_refused(tmp_path, table, message):
    path = tmp_path / "speed.parquet"
    table.to_parquet(path)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        read_series(path)


def test_a_csv_called_parquet_is_refused(tmp_path):
    (tmp_path / "speed.parquet").write_text(GOOD)
    with pytest.raises(DataError, match=r"cannot be read as parquet .*b'timestamp,77'"):
        read_parquet(tmp_path / "speed.parquet")
