from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from expt.job import Metric
from expt.jobs.traffic.metrics import error_metrics
from expt.result import (
    EARLIER_WORDS,
    FILE_NAME,
    LAUNCH_NAME,
    OUTCOMES,
    Outcome,
    RunResult,
    Status,
    load_result,
    save_launch,
    started_seconds,
)

AHEAD = ("mae_15min", "mae_30min", "mae_60min")


def filled() -> RunResult:
    return RunResult(
        "completed",
        "early_stopping",
        resumed_from_step=100,
        weights_sha256="ab" * 32,
        preset="lite",
        device="cpu (x86_64)",
        epochs=12,
        steps=1200,
        seconds=93.5,
        parameters=93_000,
        metrics={"val/mae": 3.115, "test/mae": 3.307, "test/mae_15min": None},
        memory={"peak_allocated_bytes": 1 << 30, "meter": "a ledger"},
        oom_events=[{"step": 3, "requested_bytes": 10}],
        tracking={"uri": "sqlite:///x.db", "run_id": "1", "parent_run_id": None},
    )


def test_a_result_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    filled().save(tmp_path / "run")
    assert load_result(tmp_path / "run") == filled()


def test_the_file_is_plain_json_with_every_field(tmp_path: Path) -> None:
    RunResult("failed", "error").save(tmp_path)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert FILE_NAME == "result.json"
    assert stored == asdict(RunResult("failed", "error"))
    assert set(stored["memory"]) == {
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "predicted_peak_bytes",
        "budget_bytes",
        "meter",
        "prediction_error",
    }


def test_a_record_without_a_unit_is_in_mph(tmp_path: Path) -> None:
    stored = asdict(RunResult("failed", "error"))
    del stored["unit"]
    (tmp_path / FILE_NAME).write_text(json.dumps(stored))
    loaded = load_result(tmp_path)
    assert loaded is not None and loaded.unit == "mph"


def test_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    result = filled()
    result.metrics["val/mae"] = float("nan")
    result.save(tmp_path)
    loaded = load_result(tmp_path)
    assert loaded is not None
    assert loaded.metrics["val/mae"] is None
    assert loaded.metrics["test/mae"] == 3.307


def test_results_share_no_default() -> None:
    one, other = RunResult("failed", "error"), RunResult("failed", "error")
    one.metrics["val/mae"] = 1.0
    one.memory["meter"] = "m"
    one.tracking["uri"] = "u"
    one.oom_events.append({})
    assert other == RunResult("failed", "error")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b"{}",
        b'{"status": "completed"}',
        b'{"status": "completed", "stop_reason": "epochs", "memory": null}',
        b"\xff\xfe\x00",
    ],
)
def test_garbage_is_no_result(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert load_result(tmp_path) is None


def test_what_a_later_version_wrote_besides_is_left_out(tmp_path: Path) -> None:
    filled().save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 1}))
    assert load_result(tmp_path) == filled()


def test_a_run_was_started_when_it_first_was(tmp_path: Path) -> None:
    launch = {"overrides": [], "cwd": "/", "config_dir": None}
    assert started_seconds(tmp_path) == 0
    (tmp_path / LAUNCH_NAME).write_text(json.dumps(launch))
    os.utime(tmp_path / LAUNCH_NAME, (5, 5))
    assert started_seconds(tmp_path) == 5, "of an earlier version"
    save_launch(tmp_path, {**launch, "overrides": ["trainer.max_epochs=9"]})
    assert started_seconds(tmp_path) == 5


def test_no_file_is_no_result(tmp_path: Path) -> None:
    assert load_result(tmp_path) is None
    assert load_result(tmp_path / "nowhere") is None
    (tmp_path / FILE_NAME).mkdir()
    assert load_result(tmp_path) is None


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("failed", 1), ("stopped", 1)])
def test_the_exit_code(status: Status, code: int) -> None:
    assert RunResult(status, "reason").exit_code == code


def test_every_figure_is_there_from_the_beginning() -> None:
    result = RunResult("failed", "error")
    result.describe(error_metrics(12, 300, "mph"), "mae")
    assert result.metrics == dict.fromkeys(
        ["val/mae", *(f"test/{name}" for name in ("mae", *AHEAD, "rmse", "mape"))]
    )
    result.metrics["val/mae"] = 3.0
    result.describe(error_metrics(12, 300, "mph"), "mae")
    assert result.value() == 3.0


def test_a_record_describes_its_metrics(tmp_path: Path) -> None:
    accuracy = Metric("accuracy", goal="max", label="accuracy", percent=True)
    result = RunResult("completed", "epochs")
    result.describe([accuracy, Metric("loss")], "accuracy")
    result.save(tmp_path)
    loaded = load_result(tmp_path)
    assert loaded is not None
    assert (loaded.metric(), loaded.metric("val/loss")) == (accuracy, Metric("loss"))
    assert loaded.metric("test/unknown") == Metric("unknown")


def test_a_record_from_before_is_of_errors_in_its_unit(tmp_path: Path) -> None:
    stored = asdict(filled())
    for name in ("monitor", "metrics_meta", "skipped_samples", "data_fingerprint"):
        del stored[name]
    (tmp_path / FILE_NAME).write_text(json.dumps(stored))
    loaded = load_result(tmp_path)
    assert loaded is not None
    assert loaded.metric() == Metric("mae", unit="mph")
    assert loaded.metric("test/mape").text(0.0912) == "9.12 %"
    assert loaded.value() == 3.115


@pytest.mark.parametrize(
    ("status", "reason", "outcome"),
    [
        ("completed", "early_stopping", Outcome.completed),
        ("failed", "out_of_memory", Outcome.out_of_memory),
        ("failed", "OutOfMemoryError: CUDA out of memory", Outcome.out_of_memory),
        ("failed", "RecoveryError: memory ran out", Outcome.out_of_memory),
        ("failed", "non_finite_loss", Outcome.diverged),
        ("failed", "RuntimeError: a bad lens", Outcome.failed),
        ("stopped", "signal", Outcome.stopped),
    ],
)
def test_how_a_run_ended(status: Status, reason: str, outcome: Outcome) -> None:
    assert RunResult(status, reason).outcome is outcome


def test_every_outcome_has_its_columns_and_reads_earlier_words() -> None:
    assert set(OUTCOMES) == set(Outcome)
    assert all(Outcome.parse(outcome.value) is outcome for outcome in Outcome)
    assert Outcome.parse("oom") is Outcome.out_of_memory
    assert {Outcome.parse(word) for word in EARLIER_WORDS} == {
        Outcome(name) for name in EARLIER_WORDS.values()
    }
    assert Outcome.parse(None) is Outcome.parse("whatever") is Outcome.unfinished
    # What an earlier version's trials were told to Optuna and MLflow stays what it was.
    assert Outcome.out_of_memory.columns.trial_state == "PRUNED"
    assert Outcome.predicted_over.columns.counts is False
