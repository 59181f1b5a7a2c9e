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


def test_a_table_names_every_commit_and_processor_of_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    made = {
        "date": "2026-01-01", "commit": "a" * 40, "torch": "2", "command": "python x",
        "hardware": {"cores": 2, "cpu": "A"},
    }  # fmt: skip
    rows = {
        "one": {"commit": "a" * 40, "processor": "A"}, "two": {"commit": "b" * 40, "processor": "B"}
    }  # fmt: skip
    said = common.source_line({"made": made, "rows": rows}, "x")
    assert "commits aaaaaaaaaa, bbbbbbbbbb, 2 cores, A and B, torch 2" in said
    row = common.stamped({"figure": 1})
    assert row["figure"] == 1 and row["processor"] == common.provenance()["hardware"]["cpu"]
