"""Everything happens to a search that may, and every trial has to be there once in the end.

A search of 30 short trials over a model that, at some points of the space, returns NaN, takes
more memory than it may, hangs, crashes, or kills its own process. Meanwhile trials are killed
from outside, and so is the search itself, three times, without a word; each time the same command
is started again. Then the study, the tracker and ``sweep.json`` are compared trial by trial.

    python benchmarks/sweep_faults.py [--again] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from common import kept, markdown, provenance, source_line, store
from faulty_model import CRASH, DIE, HANG, NAN, OUT_OF_MEMORY

from expt.result import Outcome
from expt.run.process import identity, is_alive
from expt.search.trial import KIND, STARTED, kind_of
from expt.search.winner import SweepSummary

NAME = "sweep_faults"
STUDY = "faults"
BUDGET = "48MiB"
FAULTS = (0, OUT_OF_MEMORY, NAN, DIE, HANG, CRASH)
MODEL = "_target_: faulty_model.Faulty\nwidth: 8\nfault: 0\n"
SEARCH = """# @package _global_
defaults:
  - override /hydra/sweeper: expt
  - override /model: faulty
trainer: {{epochs: 2, steps_per_epoch: 3, eval_batches: 1, progress: false}}
memory: {{budget: {budget}, watch: false}}
data: {{batch_size: 4, eval_batch_size: 8}}
search:
  study: {study}
  n_trials: {n_trials}
  trial_time_limit_seconds: {limit}
  enqueue: {enqueue}
  space:
    model.width: choice(8,16,32,64,65536)
    model.fault: range(0,24)
    optimizer.lr: tag(log,interval(1e-3,1e-1))
"""


@dataclass
class FaultRun:
    """One search under fire.

    Args:
        folder: an empty one.
        n_trials: that the search is asked for.
        sweeper_kills: the search is killed when so many trials are finished, one after the other.
        trial_kills: a running trial is killed when so many are.
        limit_seconds: after which a trial hangs.

    """

    folder: Path
    n_trials: int = 30
    sweeper_kills: Sequence[int] = (5, 13, 21)
    trial_kills: Sequence[int] = (3, 9, 16, 24)
    limit_seconds: float = 40.0
    seconds: float = field(default=0.0, init=False)
    outlived: int = field(default=0, init=False)
    killed: int = field(default=0, init=False)
    starts: int = field(default=0, init=False)

    @property
    def sweep_dir(self) -> Path:
        """The search's folder."""
        return self.folder / "outputs" / "sweeps" / STUDY

    def run(self) -> dict[str, Any]:
        """Do it, and return what is found afterwards."""
        self._write_configuration()
        sweeper_kills, trial_kills = list(self.sweeper_kills), list(self.trial_kills)
        started = time.monotonic()
        process = self._start()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                summary = SweepSummary.load(self.sweep_dir)
                finished = summary.finished if summary else 0
                victim = self._running_trial()
                if victim is None:
                    continue
                if trial_kills and finished >= trial_kills[0]:
                    trial_kills.pop(0)
                    self.killed += 1
                    _kill(victim["pid"])
                elif sweeper_kills and finished >= sweeper_kills[0]:
                    sweeper_kills.pop(0)
                    process.kill()
                    process.wait()
                    self.outlived += self._alive_after(5.0)
                    process = self._start()
        finally:
            process.kill()
            process.wait()
        self.seconds = time.monotonic() - started
        return {"exit_code": process.returncode, **self.look()}

    def look(self) -> dict[str, Any]:
        """Compare study, tracker and ``sweep.json``."""
        url = f"sqlite:///{self.folder}/outputs/optuna.db"
        trials = optuna.load_study(study_name=STUDY, storage=url).trials
        summary = SweepSummary.load(self.sweep_dir)
        assert summary is not None
        started = [trial for trial in trials if trial.user_attrs.get(STARTED)]
        points = [json.dumps(trial.params, sort_keys=True) for trial in started]
        best = summary.best
        return {
            "trials": self.n_trials,
            "finished": summary.finished,
            "started": len(started),
            "trained_twice": len(points) - len(set(points)),
            "not_finished_in_study": sum(not trial.state.is_finished() for trial in trials),
            "numbers_missing": len(set(range(len(trials))) - {trial.number for trial in trials}),
            "kinds": dict(sorted(Counter(str(t.user_attrs.get(KIND)) for t in trials).items())),
            "adopted_or_retried": sum(t.user_attrs.get("attempts", 1) > 1 for t in started),
            "sweeper_starts": self.starts,
            "trials_killed_from_outside": self.killed,
            "processes_that_outlived_the_sweeper": self.outlived,
            "processes_left": self._alive_after(0.0),
            "best_is_feasible": best is not None
            and best["peak_allocated_bytes"] <= (summary.budget_bytes or 0),
            "best_is_tested": best is not None and "test/mae" in best,
            "best_is_smallest": best is not None
            and best["val/mae"]
            == min(t.value for t in started if t.state.name == "COMPLETE" and t.value is not None),
            **self._tracked(trials),
            "seconds": round(self.seconds, 1),
        }

    def _tracked(self, trials: Sequence[optuna.trial.FrozenTrial]) -> dict[str, Any]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/outputs/mlflow.db")
        experiment = client.get_experiment_by_name("expt")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], max_results=5000)
        children = [run for run in runs if "trial.number" in run.data.tags]
        by_number = {run.data.tags["trial.number"]: run for run in children}
        differences = []
        for trial in trials:
            run = by_number.get(str(trial.number))
            if run is None:
                differences.append(f"trial {trial.number} has no run")
                continue
            tags = run.data.tags
            kind = kind_of(trial) or Outcome.unfinished
            wanted = (kind.columns.tracker_status, trial.state.name, kind.value)
            found = (run.info.status, tags.get("trial.state"), tags.get("trial.kind"))
            if wanted != found:
                differences.append(f"trial {trial.number}: {wanted} in the study, {found}")
            value = run.data.metrics.get("best/val/mae")
            if kind is Outcome.completed and (
                value is None or abs(value - (trial.value or 0)) > 1e-6
            ):
                differences.append(f"trial {trial.number}: {trial.value} in the study, {value}")
        return {
            "runs_of_trials": len(children),
            "runs_doubled": len(children) - len(by_number),
            "differences": differences,
            "parents": len(runs) - len(children),
            "runs_left_running": sum(run.info.status == "RUNNING" for run in runs),
        }

    def _write_configuration(self) -> None:
        points = [
            {"model.width": 8, "model.fault": fault, "optimizer.lr": 0.01} for fault in FAULTS
        ]
        text = SEARCH.format(
            study=STUDY, n_trials=self.n_trials, limit=self.limit_seconds, budget=BUDGET,
            enqueue=json.dumps(points[: max(self.n_trials - 1, 1)]),
        )  # fmt: skip
        for name, content in (("search/faults.yaml", text), ("model/faulty.yaml", MODEL)):
            path = self.folder / "own" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        own = str(Path(__file__).resolve().parent)
        paths = [own, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "expt", "--config-dir=own", "-m", "search=faults"],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdout=log,
                stderr=log,
            )

    def _processes(self) -> list[dict[str, Any]]:
        found = []
        for path in self.sweep_dir.glob("trial_*/process.json"):
            try:
                process = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if is_alive(process) and not (path.parent / "result.json").exists():
                found.append(process)
        return found

    def _running_trial(self) -> dict[str, Any] | None:
        found = self._processes()
        return found[0] if found else None

    def _alive_after(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while (count := len(self._processes())) and time.monotonic() < until:
            time.sleep(0.05)
        return count


def violations(found: dict[str, Any]) -> list[str]:
    """Return what is not as it must be."""
    wanted = {
        "exit_code": 0,
        "finished": found["trials"],
        "started": found["trials"],
        "trained_twice": 0,
        "not_finished_in_study": 0,
        "numbers_missing": 0,
        "processes_that_outlived_the_sweeper": 0,
        "processes_left": 0,
        "best_is_feasible": True,
        "best_is_tested": True,
        "best_is_smallest": True,
        "runs_of_trials": sum(found["kinds"].values()),
        "runs_doubled": 0,
        "differences": [],
        "parents": 1,
        "runs_left_running": 0,
    }
    return [
        f"{name} is {found[name]!r}, not {value!r}"
        for name, value in wanted.items()
        if found[name] != value
    ]


def _kill(pid: int) -> None:
    assert identity(pid)["pid"] == pid
    os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="measure anew, in a folder that stays")
    parser.add_argument("--again", action="store_true", help="also if a result is stored")
    arguments = parser.parse_args()
    if kept(NAME, arguments.again or arguments.keep is not None):
        return
    del sys.argv[1:]  # the folder changes nothing that is found
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = FaultRun(folder).run()
    wrong = violations(found)
    result = {"made": provenance(), **found, "violations": wrong}
    rows = [[name.replace("_", " "), str(value)] for name, value in found.items()]
    store(NAME, result, markdown(["", "found"], rows) + "\n" + source_line(result, NAME))
    print(json.dumps(found, indent=2))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
