from __future__ import annotations

import signal

import pytest

from expt.job import Metric
from expt.result import Outcome, RunResult, load_result
from expt.run.process import LOG_NAME
from expt.search.ending import Ending, outcome_of, set_aside

BUDGET = 1000


def left_behind(folder, status, reason, metrics=(), memory=(), events=()):
    result = RunResult(status, reason, seconds=2.0, oom_events=list(events))
    result.metrics |= dict(metrics)
    result.memory |= dict(memory)
    result.save(folder)


@pytest.mark.parametrize(
    ("status", "reason", "ending", "kind"),
    [
        ("completed", "epochs", Ending(0), "completed"),
        ("completed", "epochs", Ending(-9), "completed"),  # killed while it said goodbye
        ("completed", "epochs", Ending(0, "pruned"), "completed"),  # the pruner came too late
        ("failed", "out_of_memory", Ending(1), "out_of_memory"),
        ("failed", "OutOfMemoryError: CUDA out of memory", Ending(1), "out_of_memory"),
        ("failed", "MemoryError: ", Ending(1), "out_of_memory"),
        ("failed", "non_finite_loss", Ending(1), "diverged"),
        ("failed", "RuntimeError: shapes", Ending(1), "failed"),
        ("stopped", "signal", Ending(143, "pruned"), "pruned"),
        ("stopped", "signal", Ending(-9, "timeout"), "timeout"),
        ("stopped", "signal", Ending(143), "killed"),
    ],
)
def test_a_result_says_how_a_trial_ended(tmp_path, status, reason, ending, kind):
    left_behind(tmp_path, status, reason, {"val/mae": 3.0}, {"peak_allocated_bytes": 900})
    found = outcome_of(tmp_path, ending, BUDGET)
    assert found.kind.value == kind
    assert found.value == (3.0 if kind == "completed" else None)


@pytest.mark.parametrize(
    ("own", "wanted", "kind"),
    [("a", "a", "completed"), ("b", "a", "refused"), (None, "a", "completed"),
     ("b", None, "completed")],
)  # fmt: skip
def test_a_trial_on_other_data_is_not_ranked(tmp_path, own, wanted, kind):
    result = RunResult("completed", "epochs", data_fingerprint=own)
    result.metrics["val/mae"] = 3.0
    result.save(tmp_path)
    found = outcome_of(tmp_path, Ending(0), BUDGET, data=wanted)
    assert (found.kind.value, found.value) == (kind, 3.0 if kind == "completed" else None)
    assert kind == "completed" or "fingerprint b, and of the search a" in found.error


@pytest.mark.parametrize(
    ("ending", "kind", "error"),
    [
        (Ending(-signal.SIGKILL), "killed", "killed by SIGKILL, perhaps for lack of host memory"),
        (Ending(-signal.SIGSEGV), "killed", "killed by SIGSEGV"),
        (Ending(-9, "timeout", 12.0), "timeout", "search.trial_time_limit_seconds (12 s)"),
        (Ending(-15, "pruned"), "pruned", None),
        (Ending(2), "refused", "model.embed_dim=5 must be even"),
        (Ending(1), "failed", "model.embed_dim=5 must be even"),
    ],
)
def test_without_a_result_the_exit_code_and_the_last_words_do(tmp_path, ending, kind, error):
    (tmp_path / LOG_NAME).write_text("begins\nerror: model.embed_dim=5 must be even\nbye\n")
    found = outcome_of(tmp_path, ending, BUDGET)
    assert found.kind.value == kind
    assert found.error is error is None or error in found.error


def test_a_process_that_says_nothing_is_told_by_its_code(tmp_path):
    assert "exit code 1" in outcome_of(tmp_path, Ending(1), BUDGET).error


def test_more_than_the_budget_is_infeasible(tmp_path):
    memory = {"peak_allocated_bytes": 900, "peak_reserved_bytes": 1001}
    left_behind(tmp_path, "completed", "epochs", {"val/mae": 3.0}, memory)
    found = outcome_of(tmp_path, Ending(0), BUDGET)
    assert found.kind is Outcome.over_budget
    assert (found.peak_bytes, found.demand_bytes) == (900, 1001)
    assert outcome_of(tmp_path, Ending(0), None).kind is Outcome.completed


def test_what_was_missing_is_what_the_last_error_says(tmp_path):
    events = [
        {"bytes_requested": 50, "bytes_free": 10},
        {"bytes_requested": 400, "bytes_free": 100},
        {"bytes_requested": None, "bytes_free": None},
    ]
    memory = {"peak_allocated_bytes": 900}
    left_behind(tmp_path, "failed", "out_of_memory", memory=memory, events=events)
    found = outcome_of(tmp_path, Ending(1), BUDGET)
    assert found.excess_bytes == 300
    assert found.demand_bytes is None, "what did fit says nothing about what did not"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_completed_run_without_a_figure_is_nan(tmp_path, value):
    left_behind(tmp_path, "completed", "epochs", {"val/mae": value})
    assert outcome_of(tmp_path, Ending(0), BUDGET).kind is Outcome.diverged


def test_the_figure_is_that_of_the_metric_that_was_monitored(tmp_path):
    accuracy = Metric("accuracy", goal="max")
    result = RunResult("completed", "epochs")
    result.describe([accuracy, Metric("mae")], "accuracy")
    result.metrics |= {"val/accuracy": 0.5, "test/mae": 0.1}
    result.save(tmp_path)
    assert outcome_of(tmp_path, Ending(0), BUDGET, accuracy).value == 0.5
    other = outcome_of(tmp_path, Ending(0), BUDGET, Metric("mae"))
    assert other.kind is Outcome.refused
    assert other.error == "it monitors accuracy (max), and the search compares mae (min)"


def test_an_earlier_attempts_result_is_put_aside_and_never_lost(tmp_path):
    for attempt in (1, 2):
        left_behind(tmp_path, "failed", f"attempt {attempt}")
        assert set_aside(tmp_path) == attempt
    assert load_result(tmp_path) is None
    assert len(list(tmp_path.glob("result.attempt_*.json"))) == 2
    left_behind(tmp_path, "completed", "epochs")
    set_aside(tmp_path)
    assert load_result(tmp_path).status == "completed"
