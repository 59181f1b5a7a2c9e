from __future__ import annotations

import math

import pytest

from expt.errors import ConfigError
from expt.reports.sources import mlflow as tracked
from expt.reports.sources.mlflow import as_record, is_run_id, runs_by_filter, runs_by_id
from expt.tracking.query import NotThereError, StoredRun

ID = "0123456789abcdef" * 2


def stored(name: str = "a", status: str = "FINISHED", started: float = 1.0, **changed) -> StoredRun:
    given = {
        "metrics": {"val/mae": 4.0, "memory/peak_allocated_bytes": 1e9, "seconds": 5.0},
        "parameters": {"model._target_": "expt.jobs.traffic.stid.STID", "data.batch_size": "8"},
        "tags": {"preset": "lite", "device": "cpu (x86_64)"},
    }
    return StoredRun(f"id-{name}", name, status, started, **(given | changed))


def test_a_run_becomes_a_record() -> None:
    run = as_record(stored(), "val/mae")
    assert (run.name, run.state, run.error, run.preset) == ("a", "completed", 4.0, "lite")
    assert run.peak_allocated_bytes == 10**9
    assert run.budget_bytes is None
    assert (run.model, run.settings["data.batch_size"]) == ("STID", "8")


@pytest.mark.parametrize(
    ("status", "tags", "state"),
    [
        ("FAILED", {"stop_reason": "out_of_memory"}, "out_of_memory"),
        ("FAILED", {"stop_reason": "non_finite_loss"}, "failed"),
        ("KILLED", {}, "stopped"),
        ("RUNNING", {}, "unfinished"),
        ("FINISHED", {"trial.kind": "infeasible_measured", "trial.number": "7"}, "over_budget"),
        ("FAILED", {"trial.kind": "infeasible_predicted"}, "predicted_over"),
        ("FAILED", {"trial.kind": "nan"}, "failed"),
    ],
)
def test_how_a_run_ended(status, tags, state) -> None:
    run = as_record(stored(status=status, tags=tags), "val/mae")
    assert run.state == state
    assert (run.error is None) == (state not in ("completed", "over_budget"))
    if "trial.number" in tags:
        assert (run.name, run.trial) == ("trial 7", 7)


def test_no_number_is_no_number() -> None:
    run = as_record(stored(metrics={"val/mae": math.nan}, tags={"preset": "None"}), "val/mae")
    assert (run.error, run.preset) == (None, None)


def test_only_trainings_are_taken_in_the_order_of_their_starts(monkeypatch) -> None:
    spared = {"kind": "trial", "trial.kind": "infeasible_predicted", "trial.number": "3"}
    found = [
        stored("late", started=9),
        stored("plan", parameters={}, tags={"kind": "plan"}),
        stored("spared", started=5, parameters={"model.dropout": "0.1"}, tags=spared),
        stored("again", started=6, tags=spared | {"trial.kind": "duplicate"}),
        stored("early", started=2),
    ]
    monkeypatch.setattr(tracked, "runs_under", lambda uri, run_id: found)
    runs = runs_by_id("sqlite:///x.db", [ID, ID], "val/mae")
    assert [r.name for r in runs.records] == ["early", "trial 3", "late"], "once each"
    monkeypatch.setattr(tracked, "runs_under", lambda uri, run_id: found[1:2])
    with pytest.raises(ConfigError, match="there is no training run"):
        runs_by_id("sqlite:///x.db", [ID], "val/mae")


def test_mistakes_name_the_key(monkeypatch) -> None:
    def nowhere(*arguments: object) -> None:
        raise NotThereError("there is no experiment 'x'")

    monkeypatch.setattr(tracked, "runs_of_experiment", nowhere)
    with pytest.raises(ConfigError, match=r"report\.experiment=x: there is no experiment"):
        runs_by_filter("sqlite:///x.db", "x", None, "val/mae")
    with pytest.raises(ConfigError, match=r"tracking\.uri names no store"):
        runs_by_filter(None, "x", None, "val/mae")


def test_what_can_be_a_run_id() -> None:
    assert is_run_id(ID)
    assert not is_run_id("outputs") and not is_run_id(ID[:-1]) and not is_run_id(ID.upper())
