"""Scoring of plans against published runs: errors, verdicts, bounds, and the runs that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The program and its tables, imported as the program is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import published_gpu
    import published_tables

    yield published_gpu, published_tables
    for name in ("published_gpu", "published_tables", "common"):
        sys.modules.pop(name, None)


def second(memory: int, ran_out: bool, error: float | None = None):
    """Return a tool's estimate, and how a second run with that limit went."""
    return {"memory": memory, "second_oom": ran_out, "second_error": error}


def row(**changes):
    xmem = {"memory": 900, "oom": False, "error": 0.1, "second_oom": False, "second_error": 0.0}
    return {
        "model": "VGG16", "batch": 1, "optimizer": "SGD", "gpu": "RTX 3060", "family": "cnn",
        "total_gpu_memory": 2000, "ground": 1000, "real_oom": False, "zero_grad_mode": None,
        "xMem": xmem, "DNNMem": None, "SchedTune": None, "LLMem": None, "source": "a.json",
        "predicted_reserved_bytes": 1020, "interval_bytes": [950, 1100], "runs_out": False,
        "least_fitting_bytes": 1071, "peak_bytes": 900, "method": "trace", "seconds": 1.0,
        **changes,
    }  # fmt: skip


def test_the_rows_are_what_was_published() -> None:
    rows = json.loads((BENCHMARKS / "data/published_gpu_rows.json").read_text())
    assert len(rows) == 105
    assert sum(found["real_oom"] for found in rows) == 7
    assert {"model", "optimizer", "batch", "gpu", "ground", "xMem", "source"} <= rows[0].keys()


def test_errors_are_of_runs_that_did_not_run_out(modules) -> None:
    _, tables = modules
    rows = [row(), row(ground=2000, predicted_reserved_bytes=1000, xMem=None, model="gpt2")]
    assert tables.errors_of(rows, tables.OURS) == pytest.approx([0.02, 0.5])
    assert tables.errors_of(rows, "xMem") == [0.1]
    assert tables.figures([0.1, 0.2, 0.3]) == pytest.approx((0.2, 0.2, 0.3, 0.3))
    assert "10 / 10 / 10 / 10 (of 1)" in tables.errors_table(rows)


def test_verdicts_are_counted(modules) -> None:
    _, tables = modules
    ran_out = row(real_oom=True, runs_out=True)
    text = tables.verdicts_table([row(), ran_out, row(runs_out=True)])
    assert "| `plan` | 2 of 3 | 1 of 1 |" in text
    assert "| xMem | 2 of 3 | 0 of 1 |" in text


def test_bounds_are_shown_on_the_other_half(modules) -> None:
    _, tables = modules
    fitted = row(model="distilbert/distilgpt2")
    text = tables.bounds_table([fitted, row(), row(ground=1200)])
    assert "set on | 1 | 1 of 1 |" in text
    assert "other models | 1 | 1 of 2 |" in text


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({}, True),  # what it took is less than the limit
        ({"ground": 1200}, True),  # a second run with a lower limit worked
        ({"ground": 1200, "xMem": None}, None),
        ({"ground": 1200, "xMem": second(1100, True)}, False),
        ({"ground": 1200, "xMem": second(1000, True)}, None),
        ({"ground": 1200, "xMem": second(1200, False, 0.2)}, True),
        ({"ground": 1200, "xMem": second(1200, False, 0.1)}, None),
    ],
)  # fmt: skip
def test_which_runs_would_fail_with_the_margin(modules, changes, fate) -> None:
    _, tables = modules
    assert tables.fate(row(**changes)) is fate


def test_the_summary_names_the_best_other_tool(modules) -> None:
    _, tables = modules
    record = {"rows": [row()], "made": {"date": "d", "commit": "c" * 12, "command": "python x",
              "hardware": {"cores": 1, "cpu": "x"}, "torch": "2"}}  # fmt: skip
    summary, page = tables.tables(record, "published_gpu")
    assert "median error 2.0 %" in summary
    assert "the best other tool, xMem: 10 %" in summary
    assert "published_gpu.json" in page


def test_what_one_commit_planned_is_kept_and_doubles_are_planned_once(
    modules, tmp_path, monkeypatch
):
    program, _ = modules
    planned = {name: row()[name] for name in program.PLANNED} | {"date": "d", "commit": "c"}
    asked: list[int] = []

    def plans(rows):
        asked.append(len(rows))
        return iter([planned] * len(rows))

    made = {"date": "d", "commit": "c", "uncommitted_changes": False, "command": "python x",
            "hardware": {"cores": 1, "cpu": "x"}, "torch": "2"}  # fmt: skip
    monkeypatch.setattr(program, "planned_rows", plans)
    monkeypatch.setattr(program, "provenance", lambda: made)
    published = [{k: v for k, v in row(batch=b).items() if k not in planned} for b in (1, 2, 2)]
    (tmp_path / "rows.json").write_text(json.dumps(published))
    arguments = ["x", "--rows", str(tmp_path / "rows.json"), "--json", str(tmp_path / "out.json")]
    for expected in (2, 0):
        monkeypatch.setattr(sys, "argv", arguments)
        program.main()
        assert asked.pop() == expected
        written = json.loads((tmp_path / "out.json").read_text())
        assert [found["batch"] for found in written["rows"]] == [1, 2, 2]
        assert all(found["predicted_reserved_bytes"] == 1020 for found in written["rows"])
    assert (tmp_path / "out.md").exists()


def test_a_name_is_found_with_an_owner_and_a_variant(modules) -> None:
    import published_models

    assert published_models.configuration_of("google/gemma-2-2b-it") == "gemma-2-2b"
    assert published_models.configuration_of("facebook/opt-125m") == "opt-125m"
    assert published_models.configuration_of("T5-small") == "t5-small"
    assert len(published_models.CNNS) + len(published_models.CONFIGURATIONS) == 24
    with pytest.raises(KeyError, match="no model unheard-of"):
        published_models.model_of("unheard-of")
