"""The same search over Hydra's launchers, on a cluster of this machine: Ray, and submitit.

A space of four points and as many trials: each has to be trained, and none twice. Slurm itself
takes a cluster; ``submitit_local`` runs the same launcher but for `sbatch`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from expt.search.trial import KIND, STARTED
from expt.search.winner import SweepSummary

LINES = (
    "-m", "search=debug", "search.n_trials=4", "search.n_jobs=2", "search.presets=[]",
    "tracking=none", "memory.budget=1GiB", "memory.watch=false", "model.num_stages=1",
    "model.dropout=0.1", "optimizer.lr=0.001", "memory.activation_checkpointing=false",
    "model.embed_dim=choice(8,16)", "data.batch_size=choice(2,4)",
)  # fmt: skip
RAY = (
    "hydra/launcher=ray",
    "+hydra.launcher.ray.init.num_cpus=2",
    "+hydra.launcher.ray.init.include_dashboard=false",
)

RAY_ENVIRONMENT = {
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine
    "RAY_DEDUP_LOGS": "0",  # each line says which worker it is from
}


def search(folder: Path, *lines: str) -> str:
    """Run the search in a process and a session of its own; return what it said."""
    command = [sys.executable, "-m", "expt", *LINES, *lines]
    process = subprocess.Popen(
        command, cwd=folder, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, **RAY_ENVIRONMENT},
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=540)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said
    return said


def check(folder: Path, said: str) -> None:
    """Assert that every point was trained once, and the best of them tested."""
    sweep = folder / "outputs/sweeps/debug"
    study = optuna.load_study(study_name="debug", storage=f"sqlite:///{folder}/outputs/optuna.db")
    started = [trial for trial in study.trials if trial.user_attrs.get(STARTED)]
    assert [trial.user_attrs[KIND] for trial in started] == ["completed"] * 4, said
    points = {(t.params["model.embed_dim"], t.params["data.batch_size"]) for t in started}
    assert points == {(8, 2), (8, 4), (16, 2), (16, 4)}
    assert all(trial.user_attrs["peak_bytes"] > 0 for trial in started)
    assert len(list(sweep.glob("trial_*/result.json"))) == 4
    summary = SweepSummary.load(sweep)
    assert summary is not None and summary.best is not None
    assert (summary.finished, summary.failed, summary.running) == (4, 0, 0)
    assert summary.best["val/mae"] == min(trial.value for trial in started)
    assert summary.best["test/mae"] > 0


@pytest.mark.timeout(600)
def test_two_ray_workers_do_every_trial_once(tmp_path: Path) -> None:
    reason = "Ray's launcher is not installed: pip install 'expt[cluster]'"
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason=reason)
    said = search(tmp_path, *RAY)
    check(tmp_path, said)
    workers = set(re.findall(r"\(_run_job pid=(\d+)\)", said))
    assert len(workers) >= 2, said


@pytest.mark.timeout(600)
def test_submitit_does_every_trial_once(tmp_path: Path) -> None:
    reason = "submitit's launcher is not installed: pip install 'expt[cluster]'"
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason=reason)
    said = search(tmp_path, "hydra/launcher=submitit_local", "search.pruner=median")
    check(tmp_path, said)
    assert "search.pruner=median ends nothing early" in said
    assert list(tmp_path.glob("outputs/sweeps/debug/.submitit/*")), "it was used"
