"""How the comparison of sweepers counts; the searches themselves take minutes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from expt.result import RunResult

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
KINDS = ("complete", "oom", "infeasible_measured", "complete", "nan", "complete")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def rows() -> list[dict[str, object]]:
    return [
        {"kind": kind, "val_mae": 9.0 - index, "at_seconds": 10.0 * (index + 1)}
        for index, kind in enumerate(KINDS)
    ]


def test_what_was_wasted_and_what_it_took() -> None:
    from sweep import figures, nth_trained

    assert nth_trained(rows(), 2) == 4
    assert nth_trained(rows(), 9) == len(KINDS), "given up on"
    found = figures(rows(), 4)
    assert (found["launched"], found["trained"], found["wasted"], found["other"]) == (4, 2, 2, 0)
    assert found["wasted_share"] == 0.5
    assert found["best_val_mae"] == 6.0, "not 7.0, which was over the budget"
    assert found["seconds"] == 40.0
    assert figures(rows(), 6)["other"] == 1


def searched(ours: list[dict[str, object]], stock: list[dict[str, object]]) -> dict[str, object]:
    from sweep import OURS, STOCK, STOCK_TRAINED, figures

    return {
        "not_started": 2,
        "sides": {
            OURS: figures(ours, 9), STOCK: figures(stock, 2), STOCK_TRAINED: figures(stock, 9),
        },
        "rows": {OURS: ours, STOCK: stock},
        "commit": "c" * 40,
    }  # fmt: skip


def test_the_table_says_how_soon_each_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sweep

    better = [{**row, "val_mae": row["val_mae"] - 2.5} for row in rows()]
    nothing = [{**row, "kind": "oom"} for row in rows()]
    record = {
        "searches": {
            "seed 0": searched(better, rows()),
            "seed 1": searched(rows(), better),
            "seed 2": searched(rows(), nothing),
        },
        "load_average": 0.1,
        "made": {
            "date": "2026-01-01", "commit": "d" * 40, "torch": "2", "command": "python x",
            "hardware": {"cores": 2, "cpu": "A"},
        },
    }  # fmt: skip
    lines = sweep.tables(record).splitlines()
    assert lines[2] == "| ours (seed 0) | 6 | 3 | 2 (33%) | 1.500 | 1.0 min | 1.0 min |"
    assert lines[3] == "| stock (seed 0) | 2 | 1 | 1 (50%) | 9.000 | 0.2 min | 0.3 min |"
    assert lines[-1].count("2 and 2 and 2 suggestions") == 1
    assert "after: 0.7 min, never, no trial of which was trained." in lines[-1]
    assert "commits dddddddddd, cccccccccc" in lines[-1]
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    sweep.plot(record)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_a_result_that_is_stored_is_kept_unless_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert not common.kept("faults", again=False)
    (tmp_path / "faults.json").write_text('{"a": 1}')
    assert common.kept("faults", again=False) and "--again" in capsys.readouterr().out
    assert not common.kept("faults", again=True)


def test_a_stop_in_between_takes_no_time(tmp_path: Path) -> None:
    from sweep_searches import row_of

    now = time.time()
    spans = [[now - 1000, now - 900], [now - 50, now]]
    done = SimpleNamespace(number=3, value=5.0, params={}, datetime_complete=_moment(now - 10))
    assert row_of(done, "complete", 1, spans)["at_seconds"] == pytest.approx(140, abs=0.2)


def test_a_stock_trial_is_known_by_its_result(tmp_path: Path) -> None:
    from sweep_searches import states_of, stock_kind

    for folder, reason in (("stock_000/1", "out_of_memory"), ("stock_003/1", "epochs")):
        (tmp_path / folder).mkdir(parents=True)
        result = RunResult("failed" if reason == "out_of_memory" else "completed", reason)
        result.memory["peak_allocated_bytes"] = 7
        result.save(tmp_path / folder)
    (tmp_path / "stock_spans.json").write_text(json.dumps([]))
    kinds = [stock_kind(tmp_path, SimpleNamespace(number=number)) for number in (0, 1, 4)]
    assert kinds == [("failed", None), ("out_of_memory", None), ("completed", 7)]
    database = tmp_path / "stock.db"
    assert states_of(database) == []
    study = optuna.create_study(study_name="stock", storage=f"sqlite:///{database}")
    study.tell(study.ask(), 1.0)
    study.ask()
    assert states_of(database) == ["COMPLETE", "RUNNING"]
    study._storage._backend.engine.dispose()


def _moment(seconds: float) -> object:
    from datetime import datetime

    return datetime.fromtimestamp(seconds)
