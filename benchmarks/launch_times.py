"""How long a command takes to answer: `--help`, and the first optimizer step after launch.

Whole processes are timed, as a user waits for them, in rounds that alternate between the
contenders. The first step is seen from outside: a run replaces its ``progress.json`` after a step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.005
STEP_TIMEOUT_SECONDS = 180.0
BARE_APP = '''\
"""The smallest Hydra application with one setting."""
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore


@dataclass
class Config:
    size: int = 1


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(config_path=None, config_name="config")
def main(cfg):
    print(cfg.size)


main()
'''


def help_times(repeats: int) -> dict[str, Any]:
    """Return seconds of `python -m expt --help` and of a bare Hydra application's, each round's."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE_APP, encoding="utf-8")
        commands = {
            "expt": [sys.executable, "-m", "expt", "--help"],
            "bare Hydra": [sys.executable, str(bare), "--help"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(repeats + 1):  # the first round only reads files from the disk
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
                if number > 0:
                    times[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": statistics.median(values), "rounds": values}
        for name, values in times.items()
    }


def first_step_times(repeats: int, device: str, *overrides: str) -> dict[str, Any]:
    """Return seconds from launch to the first optimizer step, with and without a database.

    The database is one that an earlier, finished run made, as on every start but the first.
    """
    settings = [f"trainer.device={device}", "tracking.artifacts=artifacts", *overrides]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        no_database = first_step_seconds(folder, "new", *settings)
        earlier = [sys.executable, "-m", "expt", *settings, "debug=smoke"]
        subprocess.run(earlier, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        present, silent = [], []
        for number in range(repeats):
            present.append(first_step_seconds(folder, f"mlflow{number}", *settings))
            without = [line for line in settings if not line.startswith("tracking.")]
            silent.append(first_step_seconds(folder, f"none{number}", *without, "tracking=none"))
    return {
        "database present": {"seconds": statistics.median(present), "rounds": present},
        "tracking=none": {"seconds": statistics.median(silent), "rounds": silent},
        "no database yet": {"seconds": no_database, "rounds": [no_database]},
    }


def first_step_seconds(folder: Path, name: str, *overrides: str) -> float:
    """Launch a run in `folder` and return when its first step was done; then stop the run."""
    seen = folder / name / "checkpoints" / "progress.json"
    command = [sys.executable, "-m", "expt", *overrides, f"hydra.run.dir='{folder / name}'"]
    start = time.perf_counter()
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        while not seen.exists():
            if process.poll() is not None or time.perf_counter() - start > STEP_TIMEOUT_SECONDS:
                raise RuntimeError(
                    f"no optimizer step was seen: {(folder / f'{name}.log').read_text()[-2000:]}"
                )
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()
