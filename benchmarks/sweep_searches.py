"""The two searches that `sweep.py` compares: each run in a folder, gone on with, and read back.

Both give rows, one for each trial that was launched, in order: its kind (an `expt.result.Outcome`),
its error, its peak, and the seconds of search that had passed when it ended.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from common import ROOT
from optuna.trial import FrozenTrial

from expt.files import write_json
from expt.result import Outcome, load_result
from expt.search.trial import KIND, STARTED, kind_of

SPACE = {
    "model.embed_dim": "choice(16,32,48,64)",
    "model.num_stages": "range(1,3)",
    "model.dropout": "interval(0.0,0.3)",
    "optimizer.lr": "tag(log,interval(3e-4,1e-2))",
    "data.batch_size": "choice(8,16,32,64)",
    "memory.activation_checkpointing": "choice(false,true)",
}
NOTHING: Mapping[str, str] = MappingProxyType({})
MOST_STOCK = 4
"""The stock sweeper is given up on after so many times the trials asked for."""


def run_ours(folder: Path, lines: Sequence[str], trials: int, seed: int) -> dict[str, Any]:
    """Search with ``hydra/sweeper=expt``."""
    settings = {"study": "ours", "n_trials": trials, "seed": seed, "test_winner": False,
                "space": SPACE}  # fmt: skip
    own = folder / "own" / "search" / "benchmark.yaml"
    own.parent.mkdir(parents=True, exist_ok=True)
    head = "# @package _global_\ndefaults:\n  - override /hydra/sweeper: expt\n"
    own.write_text(f"{head}search: {json.dumps(settings)}\n", encoding="utf-8")
    command = ["-m", "expt", f"--config-dir={folder / 'own'}", "-m", "search=benchmark", *lines]
    study = folder / "outputs" / "optuna.db"
    if not _finished(folder, "ours"):
        with Clock(folder, "ours") as clock:
            clock.run(command, folder)
    told = trials_of(study, "ours")
    started = [trial for trial in told if trial.user_attrs.get(STARTED)]
    spans = spans_of(folder, "ours")
    return {
        "not_started": sum(kind_of(trial) is Outcome.predicted_over for trial in told),
        "rows": [
            row_of(trial, trial.user_attrs[KIND], trial.user_attrs.get("peak_bytes"), spans)
            for trial in started
        ],
    }


def run_stock(folder: Path, lines: Sequence[str], trials: int, seed: int) -> dict[str, Any]:
    """Search with ``hydra/sweeper=optuna``, until as many trials as ours have been trained."""
    database = folder / "stock.db"
    program = str(Path(__file__).with_name("stock_objective.py"))
    command = [
        program, "-m", "hydra/sweeper=optuna", *lines, "memory.plan=false",
        "hydra.sweeper.direction=minimize", "hydra.sweeper.max_failure_rate=1",
        "hydra.sweeper.n_jobs=1",  # as ours: one suggestion at a time, from all before it
        f"hydra.sweeper.sampler.seed={seed}", "hydra.sweeper.study_name=stock",
        f"hydra.sweeper.storage='sqlite:///{database}'",
        *(f"{name}={text}" for name, text in SPACE.items()),
    ]  # fmt: skip
    most = MOST_STOCK * trials

    def left() -> int:
        states = states_of(database)
        done = len(states) - states.count("RUNNING")
        return 0 if states.count("COMPLETE") >= trials else max(most - done, 0)

    while (count := left()) > 0:
        start = len(states_of(database))  # it would overwrite the folders of an earlier run
        with Clock(folder, "stock") as clock:
            clock.run(
                [*command, f"hydra.sweeper.n_trials={count}",
                 f"hydra.sweep.dir='{folder / f'stock_{start:03d}'}'"],
                folder, until=lambda: left() == 0,
            )  # fmt: skip
    spans = spans_of(folder, "stock")
    told = [trial for trial in trials_of(database, "stock") if trial.state.is_finished()]
    return {"rows": [row_of(trial, *stock_kind(folder, trial), spans) for trial in told]}


class Clock:
    """Notes from when to when a search ran, so that a stop in between does not count."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}_spans.json"
        self.begun = time.time()
        self.ended = 0.0

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        spans = json.loads(self.path.read_text()) if self.path.exists() else []
        write_json(self.path, [*spans, [self.begun, time.time()]])

    def run(
        self,
        command: Sequence[str],
        folder: Path,
        until: Callable[[], bool] = lambda: False,
        variables: Mapping[str, str] = NOTHING,
    ) -> None:
        """Run Python until it ends, or `until` says so; with these variables besides ours."""
        with (folder / "output.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, stdout=log, stderr=log,
                env={**environment(), **variables},
            )  # fmt: skip
        try:
            while process.poll() is None and not until():
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
        if process.returncode not in (0, -9):
            sys.exit(f"a search ended with {process.returncode}: {folder / 'output.log'}")


def environment() -> dict[str, str]:
    """Return the environment of a search: this checkout's code."""
    paths = [str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _finished(folder: Path, name: str) -> bool:
    path = folder / "outputs" / "sweeps" / name / "sweep.json"
    if not path.exists():
        return False
    summary = json.loads(path.read_text(encoding="utf-8"))
    return bool(summary["finished"] >= summary["n_trials"])


def trials_of(database: Path, study: str) -> list[FrozenTrial]:
    if not database.exists():
        return []
    try:
        return optuna.load_study(study_name=study, storage=f"sqlite:///{database}").trials
    except (KeyError, optuna.exceptions.StorageInternalError):  # nothing was asked for yet
        return []


def states_of(database: Path) -> list[str]:
    """Return the trials' states, without what Optuna does to a file that it opens."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return [row[0] for row in connection.execute("SELECT state FROM trials")]
    except sqlite3.OperationalError:  # not made yet, or being made
        return []


def spans_of(folder: Path, name: str) -> list[list[float]]:
    spans: list[list[float]] = json.loads((folder / f"{name}_spans.json").read_text())
    return spans


def row_of(
    trial: FrozenTrial, kind: str, peak: int | None, spans: Sequence[Sequence[float]]
) -> dict[str, Any]:
    assert trial.datetime_complete is not None
    end = trial.datetime_complete.timestamp()
    running = sum(min(end, until) - begun for begun, until in spans if begun < end)
    return {
        "number": trial.number,
        "kind": kind,
        "val_mae": trial.value,
        "peak_bytes": peak,
        "at_seconds": round(running, 1),
        "ended": datetime.fromtimestamp(end, UTC).isoformat(timespec="seconds"),
        "params": trial.params,
    }


def stock_kind(folder: Path, trial: FrozenTrial) -> tuple[str, int | None]:
    """Say what became of a stock trial, by the result in its folder."""
    parts = sorted(folder.glob("stock_[0-9]*"), key=lambda path: int(path.name[6:]))
    first = [path for path in parts if int(path.name[6:]) <= trial.number][-1]
    result = load_result(first / str(trial.number - int(first.name[6:])))
    if result is None:
        return Outcome.failed.value, None
    peak = result.memory["peak_allocated_bytes"] if result.status == "completed" else None
    return result.outcome.value, peak
