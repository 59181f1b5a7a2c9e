from __future__ import annotations

import json
import math

import pytest

from expt.errors import ConfigError
from expt.job import Metric
from expt.reports.records import RunSet, ranked_by
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
    run = read(stored())
    assert (run.name, run.outcome.value, run.value, run.preset) == ("a", "completed", 4.0, "lite")
    assert run.peak_allocated_bytes == 10**9
    assert run.budget_bytes is None
    assert (run.model, run.settings["data.batch_size"]) == ("STID", "8")


def read(run, metric=None):
    return ranked_by(RunSet((as_record(run),), "here"), metric).records[0]


@pytest.mark.parametrize(
    ("status", "tags", "state"),
    [
        ("FAILED", {"stop_reason": "out_of_memory"}, "out_of_memory"),
        ("FAILED", {"stop_reason": "non_finite_loss"}, "diverged"),
        ("KILLED", {}, "stopped"),
        ("RUNNING", {}, "unfinished"),
        ("FINISHED", {"trial.kind": "infeasible_measured", "trial.number": "7"}, "over_budget"),
        ("FAILED", {"trial.kind": "infeasible_predicted"}, "predicted_over"),
        ("FAILED", {"trial.kind": "nan"}, "diverged"),
        ("FINISHED", {"trial.kind": "over_budget"}, "over_budget"),
    ],
)
def test_how_a_run_ended(status, tags, state) -> None:
    run = read(stored(status=status, tags=tags))
    assert run.outcome.value == state
    assert (run.value is None) == (state not in ("completed", "over_budget"))
    if "trial.number" in tags:
        assert (run.name, run.trial) == ("trial 7", 7)


def test_no_number_is_no_number() -> None:
    run = read(stored(metrics={"val/mae": math.nan}, tags={"preset": "None"}))
    assert (run.value, run.preset) == (None, None)


def test_a_figure_in_gib_of_ones_own_is_not_taken_for_a_copy_of_one_in_bytes() -> None:
    peak = {"memory/peak_allocated_bytes": 1e9, "memory/peak_allocated_gib": 0.93}
    run = as_record(stored(metrics={"val/mae": 4.0, "test/throughput_gib": 2.5, **peak}))
    assert run.metrics["test/throughput_gib"] == 2.5
    assert "memory/peak_allocated_gib" not in run.metrics


def test_the_last_epochs_figure_of_a_metric_that_was_not_monitored_is_none() -> None:
    figures = {"val/accuracy": 0.6, "best/val/accuracy": 0.9, "val/top5": 0.7, "test/top5": 0.96}
    run = as_record(stored(metrics=figures, tags={"monitor": "accuracy"}))
    assert run.metrics == {"val/accuracy": 0.9, "test/top5": 0.96}


def test_a_figure_of_memory_is_not_in_the_unit_of_the_errors() -> None:
    run = as_record(stored(parameters={"model._target_": "m.A", "data.unit": "mph"}))
    ranked = ranked_by(RunSet((run,), "here"), "memory/peak_allocated_bytes")
    assert (ranked.records[0].value, ranked.metric.unit) == (1e9, "")


def test_the_seeds_of_a_trial_are_one_run(monkeypatch) -> None:
    tags = {
        "kind": "trial", "study": "s", "trial.number": "0", "trial.kind": "completed",
        "trial.peak_bytes": "2000", "trial.demand_bytes": "2000", "trial.seconds": "9.5",
    }  # fmt: skip
    told = {"val/accuracy": 0.8, "val/accuracy_spread": 0.1, "memory/predicted_peak_bytes": 2000.0}
    trial = stored("t", metrics=told, parameters={}, tags=tags)
    own = {"monitor": "accuracy", "mlflow.parentRunId": "id-t", "device": "cpu"}
    seeds = [
        stored(f"seed_{n}", metrics={"best/val/accuracy": v, "test/accuracy": v}, tags=own)
        for n, v in enumerate((0.7, 0.9))
    ]
    monkeypatch.setattr(tracked, "runs_under", lambda uri, run_id: [trial, *seeds])
    (run,) = ranked_by(runs_by_id("sqlite:///x.db", [ID]), None).records
    assert (run.name, run.value, run.device) == ("trial 0", 0.8, "cpu")
    assert run.metrics["test/accuracy"] == pytest.approx(0.8)
    assert (run.model, run.settings["data.batch_size"]) == ("STID", "8")
    assert (run.peak_allocated_bytes, run.peak_reserved_bytes, run.seconds) == (2000, None, 9.5)
    assert run.prediction_error == 0


def test_trials_of_several_searches_are_told_apart(monkeypatch) -> None:
    trials = [
        stored(name, tags={"kind": "trial", "study": name, "trial.number": "3"})
        for name in ("wide", "deep")
    ]
    monkeypatch.setattr(tracked, "runs_under", lambda uri, run_id: trials)
    names = [record.name for record in runs_by_id("sqlite:///x.db", [ID]).records]
    assert names == ["wide/trial 3", "deep/trial 3"]


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
    runs = runs_by_id("sqlite:///x.db", [ID, ID])
    assert [r.name for r in runs.records] == ["early", "trial 3", "late"], "once each"
    monkeypatch.setattr(tracked, "runs_under", lambda uri, run_id: found[1:2])
    with pytest.raises(ConfigError, match="there is no training run"):
        runs_by_id("sqlite:///x.db", [ID])


def test_mistakes_name_the_key(monkeypatch) -> None:
    def nowhere(*arguments: object) -> None:
        raise NotThereError("there is no experiment 'x'")

    monkeypatch.setattr(tracked, "runs_of_experiment", nowhere)
    with pytest.raises(ConfigError, match=r"report\.experiment=x: there is no experiment"):
        runs_by_filter("sqlite:///x.db", "x", None)
    with pytest.raises(ConfigError, match=r"tracking\.uri names no store"):
        runs_by_filter(None, "x", None)


def test_what_can_be_a_run_id() -> None:
    assert is_run_id(ID)
    assert not is_run_id("outputs") and not is_run_id(ID[:-1]) and not is_run_id(ID.upper())


def test_a_run_that_describes_its_metrics_is_ranked_by_the_one_it_monitored() -> None:
    described = [Metric("accuracy", goal="max"), Metric("loss")]
    tags = {
        "monitor": "accuracy",
        "metrics": json.dumps([metric.as_dict() for metric in described]),
        "data.fingerprint": "12ab",
    }
    run = as_record(stored(metrics={"val/accuracy": 0.75, "test/loss": 1.0}, tags=tags))
    ranked = ranked_by(RunSet((run,), "here"), None)
    assert (ranked.metric.name, ranked.metric.goal) == ("val/accuracy", "max")
    assert (ranked.records[0].value, run.fingerprint) == (0.75, "12ab")
    del tags["metrics"]  # of an earlier version, whose fingerprint did not know the horizon
    assert as_record(stored(tags=tags)).fingerprint is None
