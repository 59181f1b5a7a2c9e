from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from expt.result import FILE_NAME, METRIC_NAMES, RunResult, Status, load_result


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
    assert stored["metrics"] == dict.fromkeys(METRIC_NAMES)
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
        b'{"status": "completed", "stop_reason": "epochs", "unknown": 1}',
        b"\xff\xfe\x00",
    ],
)
def test_garbage_is_no_result(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert load_result(tmp_path) is None


def test_no_file_is_no_result(tmp_path: Path) -> None:
    assert load_result(tmp_path) is None
    assert load_result(tmp_path / "nowhere") is None
    (tmp_path / FILE_NAME).mkdir()
    assert load_result(tmp_path) is None


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("failed", 1), ("stopped", 1)])
def test_the_exit_code(status: Status, code: int) -> None:
    assert RunResult(status, "reason").exit_code == code
