from pathlib import Path

import pytest

from expt.drawing import drawn
from expt.errors import StorageError


def fail() -> Path:
    raise KeyError("no such sensor")


def refuse() -> Path:
    raise StorageError("the disk is full")


def test_what_fails_is_a_note_and_what_is_drawn_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert drawn(lambda: a, fail, lambda: None, lambda: [b, c]) == [a, b, c]
    assert capsys.readouterr().out.count("cannot be drawn (KeyError") == 1
    with pytest.raises(StorageError, match="the disk is full"):
        drawn(lambda: a, refuse)
