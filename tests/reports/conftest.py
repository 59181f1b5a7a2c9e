"""Runs to report on: as records, and as the folders that a training leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from expt.reports.records import RunRecord
from expt.result import Outcome, RunResult

GIB = 2**30
CONFIG = """\
model:
  _target_: expt.jobs.traffic.alternating.Alternating
  embed_dim: {embed_dim}
  patch_sizes: [1, 2]
data:
  batch_size: {batch_size}
trainer:
  seed: {seed}
  resume: false
memory:
  preset: {preset}
tracking:
  uri: null
"""


@pytest.fixture
def record() -> Callable[..., RunRecord]:
    """Make a record of a completed run, with what a test changes; peaks in GiB."""

    def make(name: str, value: float | None, peak: float | None = 1.0, **changed: Any) -> RunRecord:
        count = None if peak is None else int(peak * GIB)
        given: dict[str, Any] = {
            "outcome": Outcome.completed,
            "peak_allocated_bytes": count,
            "predicted_peak_bytes": count,
            "prediction_error": None if count is None else 0.001,
            "seconds": 60.0,
        }
        return RunRecord(name, value=value, **(given | changed))

    return make


@pytest.fixture
def put_run() -> Callable[..., Path]:
    """Write the folder of a run."""

    def put(
        folder: Path,
        error: float | None = 4.0,
        peak: int = GIB,
        status: str = "completed",
        stop_reason: str = "epochs",
        started: float = 1e9,
        predicted: int | None = None,
        budget: int | None = None,
        **config: Any,
    ) -> Path:
        folder.mkdir(parents=True)
        values = {"embed_dim": 64, "batch_size": 16, "seed": 0, "preset": "lite"} | config
        (folder / "config.yaml").write_text(CONFIG.format(**values))
        (folder / "launch.json").write_text(
            json.dumps({"overrides": [], "cwd": "/", "config_dir": None})
        )
        os.utime(folder / "launch.json", (started, started))
        result = RunResult(status, stop_reason, preset=values["preset"], device="cpu (x86_64)")  # type: ignore[arg-type]
        result.seconds = 12.5
        result.metrics |= {"val/mae": error, "test/mae": None if error is None else error + 0.2}
        predicted = peak if predicted is None else predicted
        result.memory |= {
            "peak_allocated_bytes": peak,
            "predicted_peak_bytes": predicted,
            "prediction_error": predicted / peak - 1,
            "budget_bytes": budget,
            "meter": "a ledger",
        }
        (folder / "result.json").write_text(json.dumps(asdict(result)))
        return folder

    return put
