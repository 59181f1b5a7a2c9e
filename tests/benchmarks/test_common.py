"""What every benchmark says of itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_command_names_files_without_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    monkeypatch.setattr(sys, "argv", ["/home/me/clips.py", "--only", "plans", "--rows", "/a/b.npz"])
    assert common.provenance()["command"] == "python benchmarks/clips.py --only plans --rows b.npz"
