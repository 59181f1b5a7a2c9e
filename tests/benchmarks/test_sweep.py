"""How the comparison of sweepers counts; the searches themselves take minutes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from expt.results import RunResult

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


def test_a_stop_in_between_takes_no_time(tmp_path: Path) -> None:
    from sweep_searches import _row

    now = time.time()
    spans = [[now - 1000, now - 900], [now - 50, now]]
    done = SimpleNamespace(number=3, value=5.0, params={}, datetime_complete=_moment(now - 10))
    assert _row(done, "complete", 1, spans)["at_seconds"] == pytest.approx(140, abs=0.2)


def test_a_stock_trial_is_known_by_its_result(tmp_path: Path) -> None:
    from sweep_searches import _states, _stock_kind

    for folder, reason in (("stock_000/1", "out_of_memory"), ("stock_003/1", "epochs")):
        (tmp_path / folder).mkdir(parents=True)
        result = RunResult("failed" if reason == "out_of_memory" else "completed", reason)
        result.memory["peak_allocated_bytes"] = 7
        result.save(tmp_path / folder)
    (tmp_path / "stock_spans.json").write_text(json.dumps([]))
    kinds = [_stock_kind(tmp_path, SimpleNamespace(number=number)) for number in (0, 1, 4)]
    assert kinds == [("crashed", None), ("oom", None), ("complete", 7)]
    database = tmp_path / "stock.db"
    assert _states(database) == []
    study = optuna.create_study(study_name="stock", storage=f"sqlite:///{database}")
    study.tell(study.ask(), 1.0)
    study.ask()
    assert _states(database) == ["COMPLETE", "RUNNING"]
    study._storage._backend.engine.dispose()


def _moment(seconds: float) -> object:
    from datetime import datetime

    return datetime.fromtimestamp(seconds)
