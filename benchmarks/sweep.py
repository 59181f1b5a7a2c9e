"""Ours against the stock sweeper of Hydra and Optuna: the same search, the same enforced budget.

Both search the same space with the same sampler (TPE) and seed, on real traffic data, one trial
after the other, and every trial runs under the same enforced `memory.budget` without recovery
(`memory.recover=false`), so that what does not fit ends. Ours predicts each trial's peak and
tells the sampler by how much it is over; the stock sweeper (``max_failure_rate=1``, or it would
stop at the first) sees a failure, and has no plan (`memory.plan=false`): it could do nothing
with one. It is looked at twice: after as many trials as ours trained, and after as many have
been trained to their end, which takes it more of them.

    python benchmarks/sweep.py [--trials 30] [--seeds 0] [--smoke]

Resumable: what is finished is kept in outputs/benchmarks/sweep, and a search that was stopped
goes on; its time is then the sum of its parts.
"""

from __future__ import annotations

import argparse
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
from typing import Any

import optuna
from common import RESULTS, ROOT, load, markdown, provenance, source_line, stamped, store
from optuna.trial import FrozenTrial

from expt.files import replace_atomically, write_json
from expt.results import load_result
from expt.sweep.trials import KIND, OVER, STARTED
from expt.units import parse_bytes

NAME = "sweep"
BUDGET = "48MiB"
SPACE = {
    "model.embed_dim": "choice(16,32,48,64)",
    "model.num_stages": "range(1,3)",
    "model.dropout": "interval(0.0,0.3)",
    "optimizer.lr": "tag(log,interval(3e-4,1e-2))",
    "data.batch_size": "choice(8,16,32,64)",
    "memory.activation_checkpointing": "choice(false,true)",
}
SHARED = (
    "data=metr_la_29", "data.eval_batch_size=64", "model.patch_sizes=[1]", "trainer.epochs=2",
    "trainer.progress=false", "trainer.test=false", "tracking=none", "memory.recover=false",
)  # fmt: skip
SIZES = {False: ("trainer.steps_per_epoch=60", "trainer.eval_batches=60"),
         True: ("trainer.steps_per_epoch=2", "trainer.eval_batches=1")}  # fmt: skip
MOST_STOCK = 4
"""The stock sweeper is given up on after so many times the trials asked for."""
OURS, STOCK, STOCK_TRAINED = "ours", "stock", "stock, as many trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--smoke", action="store_true", help="seconds a trial, nothing is stored")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"searches": {}} if arguments.smoke else load(NAME)
    record.setdefault("searches", {})
    for seed in arguments.seeds:
        name = f"{arguments.trials} trials, seed {seed}"
        folder = ROOT / "outputs" / "benchmarks" / ("sweep_smoke" if arguments.smoke else "sweep")
        found = compare(folder / name.replace(", ", "-").replace(" ", "_"), arguments, seed)
        record["searches"][name] = stamped({**found, "trials": arguments.trials, "seed": seed})
        record["made"] = provenance()
        print(tables(record))
        if not arguments.smoke:
            store(NAME, record, tables(record))
            plot(record)


def compare(folder: Path, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run both searches, or what is left of them, and return what is seen of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*SHARED, *SIZES[arguments.smoke], f"memory.budget={BUDGET}"]
    trials = arguments.trials
    ours = run_ours(folder, lines, trials, seed)
    stock = run_stock(folder, lines, trials, seed)
    return {
        "space": SPACE,
        "settings": lines,
        "budget_bytes": parse_bytes(BUDGET),
        "not_started": ours["not_started"],
        "sides": {
            OURS: figures(ours["rows"], trials),
            STOCK: figures(stock["rows"], trials),
            STOCK_TRAINED: figures(stock["rows"], nth_trained(stock["rows"], trials)),
        },
        "rows": {OURS: ours["rows"], STOCK: stock["rows"]},
    }


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
        with _Clock(folder, "ours") as clock:
            clock.run(command, folder)
    told = _trials(study, "ours")
    started = [trial for trial in told if trial.user_attrs.get(STARTED)]
    spans = _spans(folder, "ours")
    return {
        "not_started": sum(trial.user_attrs[KIND] == "infeasible_predicted" for trial in told),
        "rows": [
            _row(trial, trial.user_attrs[KIND], trial.user_attrs.get("peak_bytes"), spans)
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
        f"hydra.sweeper.sampler.seed={seed}", "hydra.sweeper.study_name=stock",
        f"hydra.sweeper.storage='sqlite:///{database}'",
        *(f"{name}={text}" for name, text in SPACE.items()),
    ]  # fmt: skip
    most = MOST_STOCK * trials

    def left() -> int:
        states = _states(database)
        done = len(states) - states.count("RUNNING")
        return 0 if states.count("COMPLETE") >= trials else max(most - done, 0)

    while (count := left()) > 0:
        start = len(_states(database))  # it would overwrite the folders of an earlier run
        with _Clock(folder, "stock") as clock:
            clock.run(
                [*command, f"hydra.sweeper.n_trials={count}",
                 f"hydra.sweep.dir='{folder / f'stock_{start:03d}'}'"],
                folder, until=lambda: left() == 0,
            )  # fmt: skip
    spans = _spans(folder, "stock")
    told = [trial for trial in _trials(database, "stock") if trial.state.is_finished()]
    return {"rows": [_row(trial, *_stock_kind(folder, trial), spans) for trial in told]}


def figures(rows: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Return what the first `count` trials come to."""
    rows = rows[:count]
    trained = [row for row in rows if row["kind"] == "complete"]
    wasted = [row for row in rows if row["kind"] in OVER]
    return {
        "launched": len(rows),
        "trained": len(trained),
        "wasted": len(wasted),
        "other": len(rows) - len(trained) - len(wasted),
        "wasted_share": round(len(wasted) / len(rows), 4),
        "best_val_mae": min((row["val_mae"] for row in trained), default=None),
        "seconds": rows[-1]["at_seconds"],
    }


def nth_trained(rows: Sequence[Mapping[str, Any]], count: int) -> int:
    """Return how many trials were launched by the time that `count` were trained, or all."""
    trained = 0
    for index, row in enumerate(rows, 1):
        trained += row["kind"] == "complete"
        if trained == count:
            return index
    return len(rows)


def tables(record: Mapping[str, Any]) -> str:
    """Return the README's table."""
    columns = ("search", "launched", "trained", "wasted", "best val MAE", "wall time")
    rows = []
    for name, search in record["searches"].items():
        for side, found in search["sides"].items():
            best = found["best_val_mae"]
            rows.append(
                (
                    side if len(record["searches"]) == 1 else f"{side} ({name})",
                    str(found["launched"]),
                    str(found["trained"]),
                    f"{found['wasted']} ({found['wasted_share']:.0%})",
                    "-" if best is None else f"{best:.3f}",
                    f"{found['seconds'] / 60:.1f} min",
                )
            )
    search = next(iter(record["searches"].values()))
    note = (
        f"TPE, the same space and seed, every trial under an enforced budget of {BUDGET}, no "
        f"recovery. Wasted: launched, and out of memory. Ours left {search['not_started']} "
        "suggestions unlaunched, which were predicted not to fit. "
    )
    return markdown(columns, rows) + "\n" + note + source_line(record, NAME)


def plot(record: Mapping[str, Any]) -> None:
    """Draw the best error so far against wall time, and the trials that were wasted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    search = list(record["searches"].values())[-1]
    for color, (side, rows) in zip(("C0", "C1"), search["rows"].items(), strict=True):
        minutes, best, crosses = [], [], []
        for row in rows:
            if row["kind"] == "complete":
                best.append(min([row["val_mae"], *best[-1:]]))
                minutes.append(row["at_seconds"] / 60)
            elif row["kind"] in OVER and best:
                crosses.append((row["at_seconds"] / 60, best[-1]))
        axes.step(minutes, best, where="post", color=color, linewidth=1.4, label=side)
        if crosses:
            axes.plot(*zip(*crosses, strict=True), "x", color=color, markersize=5,
                      label=f"{side}: out of memory")  # fmt: skip
    axes.set(xlabel="wall time (min)", ylabel="best validation MAE so far (mph)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path: Path = RESULTS / f"{NAME}.png"
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


class _Clock:
    """Notes from when to when a search ran, so that a stop in between does not count."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}_spans.json"
        self.begun = time.time()
        self.ended = 0.0

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *_: object) -> None:
        spans = json.loads(self.path.read_text()) if self.path.exists() else []
        write_json(self.path, [*spans, [self.begun, time.time()]])

    def run(
        self, command: Sequence[str], folder: Path, until: Callable[[], bool] = lambda: False
    ) -> None:
        """Run Python until it ends, or `until` says so."""
        with (folder / "output.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, stdout=log, stderr=log, env=environment()
            )
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


def _trials(database: Path, study: str) -> list[FrozenTrial]:
    if not database.exists():
        return []
    try:
        return optuna.load_study(study_name=study, storage=f"sqlite:///{database}").trials
    except (KeyError, optuna.exceptions.StorageInternalError):  # nothing was asked for yet
        return []


def _states(database: Path) -> list[str]:
    """Return the trials' states, without what Optuna does to a file that it opens."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return [row[0] for row in connection.execute("SELECT state FROM trials")]
    except sqlite3.OperationalError:  # not made yet, or being made
        return []


def _spans(folder: Path, name: str) -> list[list[float]]:
    spans: list[list[float]] = json.loads((folder / f"{name}_spans.json").read_text())
    return spans


def _row(
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


def _stock_kind(folder: Path, trial: FrozenTrial) -> tuple[str, int | None]:
    """Say what became of a stock trial, by the result in its folder."""
    parts = sorted(folder.glob("stock_[0-9]*"), key=lambda path: int(path.name[6:]))
    first = [path for path in parts if int(path.name[6:]) <= trial.number][-1]
    result = load_result(first / str(trial.number - int(first.name[6:])))
    if result is None:
        return "crashed", None
    if result.status == "completed":
        return "complete", result.memory["peak_allocated_bytes"]
    return ("oom" if result.stop_reason == "out_of_memory" else "crashed"), None


if __name__ == "__main__":
    main()
