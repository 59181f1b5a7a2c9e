from pathlib import Path

import pytest

from expt.errors import DataError
from expt.jobs.traffic.source import checked_suffix, named, translated

KNOWN = (".npz", ".csv")


def test_the_suffix_is_returned_in_lower_case(tmp_path):
    path = tmp_path / "SPEED.CSV"
    path.write_text("x")
    assert checked_suffix(path, KNOWN) == ".csv"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file; check the path"):
        checked_suffix(tmp_path / "absent.csv", KNOWN)


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        checked_suffix(tmp_path / "folder.csv", KNOWN)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=r"is empty \(0 bytes\)"):
        checked_suffix(tmp_path / "empty.csv", KNOWN)


def test_an_unknown_suffix_is_refused_with_those_known(tmp_path):
    (tmp_path / "speed.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"unknown suffix '.xlsx'; expected one of .csv, .npz"):
        checked_suffix(tmp_path / "speed.xlsx", KNOWN)
    for name, advice in {"a.csv.gz": "unpack it", "a.tsv": "commas between"}.items():
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=advice):
            checked_suffix(tmp_path / name, KNOWN)


def test_a_file_as_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be opened: Not a directory"):
        checked_suffix(tmp_path / "file" / "speed.csv", KNOWN)


def test_a_device_is_refused(tmp_path):
    (tmp_path / "null.csv").symlink_to("/dev/null")
    with pytest.raises(DataError, match="not a regular file"):
        checked_suffix(tmp_path / "null.csv", KNOWN)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "secret.csv"
    path.write_text("x")

    def refuse(self, *args, **kwargs):  # chmod does not stop root, under which tests may run
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="permission denied; make it readable"):
        checked_suffix(path, KNOWN)


def test_a_path_that_cannot_be_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be opened: File name too long"):
        checked_suffix(tmp_path / ("x" * 300 + ".csv"), KNOWN)
    with pytest.raises(DataError, match=r"cannot be opened: .*null"):
        checked_suffix(Path("\0.csv"), KNOWN)


def test_the_path_is_put_in_front():
    with pytest.raises(DataError, match=r"^speed.csv: is odd$"), named(Path("speed.csv")):
        raise DataError("is odd")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"abc", "b'abc'"),
    ],
)
def test_a_damaged_file_is_described(tmp_path, content, found):
    path = tmp_path / "speed.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=found) as caught, translated(path, "NumPy", KeyError):
        raise KeyError("first line\nsecond line")
    assert "cannot be read as NumPy (KeyError" in str(caught.value)


def test_a_file_that_is_locked_is_not_called_damaged(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"x")
    with (
        pytest.raises(DataError, match="open for writing in another program"),
        translated(tmp_path / "x.h5", "HDF5", OSError),
    ):
        raise BlockingIOError(11, "unable to lock file")


def test_other_errors_pass(tmp_path):
    with pytest.raises(ZeroDivisionError), translated(tmp_path, "NumPy", KeyError):
        raise ZeroDivisionError
