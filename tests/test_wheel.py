"""The wheel, installed and run outside the repository."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def env_of(home: Path) -> dict[str, str]:
    """Nothing of the repository, one thread."""
    return {
        "PYTHONPATH": str(home / "site"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }


def test_the_wheel_runs_outside_the_repository(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "expt/conf/config.yaml" in names
    assert "expt/jobs/traffic/files/metr_la_29.npz" in names
    assert "hydra_plugins/expt_sweeper/sweeper.py" in names
    assert "hydra_plugins/__init__.py" not in names, "others have plugins there too"
    # Like `pip install --no-deps --target site`, whose dependencies are in this environment.
    program = "from expt.__main__ import main; main()"
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, "model=stid", "debug=smoke", "hydra.run.dir=run"],
        cwd=tmp_path / "elsewhere",
        env=env_of(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import expt; print(expt.__file__)"],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in where.stdout
    result = json.loads((tmp_path / "elsewhere/run/result.json").read_text())
    assert result["status"] == "completed"
    assert (tmp_path / "elsewhere/outputs/mlflow.db").exists()
    # The sweeper is found there too; trials are processes that find everything again.
    searched = subprocess.run(
        [
            sys.executable, "-c", program, "-m", "search=debug", "search.n_trials=1",
            "search.test_winner=false", "search.presets=[]", "tracking=none", "model.num_stages=1",
        ],
        cwd=tmp_path / "elsewhere",
        env=env_of(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert searched.returncode == 0, searched.stderr
    sweep = json.loads((tmp_path / "elsewhere/outputs/sweeps/debug/sweep.json").read_text())
    assert sweep["finished"] == 1
    log = (tmp_path / "elsewhere/outputs/sweeps/debug/trial_000/output.log").read_text()
    assert "completed" in log
