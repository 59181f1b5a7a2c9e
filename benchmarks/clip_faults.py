"""What a run on clips survives: kill -9 anywhere, a lack of memory anywhere, a worker that dies."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import last_words, markdown, run_expt

STEPS = 48
LINE = (
    "experiment=video", "+memory=lite", "trainer.epochs=4", "trainer.test=false",
    "trainer.checkpoint_every_steps=5", "memory.plan=false", "model.width=8",
)  # fmt: skip
FAULTY = '''"""A network and data that break where the environment says."""

import os
import signal

import torch

from expt.jobs.video.data import VideoClips
from expt.jobs.video.r3d import R3D

KILL_AT = int(os.environ.get("KILL_AT", "0"))
OOM_AT = {int(n) for n in os.environ.get("OOM_AT", "").split(",") if n}


class Net(R3D):
    calls = 0

    def forward(self, clip, keypoints=None):
        if self.training and torch.is_grad_enabled():
            Net.calls += 1
            if Net.calls == KILL_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            if Net.calls in OOM_AT:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().forward(clip, keypoints)


class Logged(VideoClips):
    def item(self, split, index, generator):
        found = super().item(split, index, generator)
        if "READS" in os.environ:
            with open(os.environ["READS"], "a") as log:
                log.write(f"{split} {index} {int(found.inputs['clip'].sum())}\\n")
        return found
'''
CLASSES = ("model._target_=faulty_clips.Net", "data._target_=faulty_clips.Logged")


def faults() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the disturbances by name."""
    return {
        "kill -9 at six places, workers 0 and 2 in turn": killed,
        "out of memory at ten places": partial(lacking, 10),
        "a worker killed": worker_killed,
    }


def killed() -> dict[str, Any]:
    """Kill a run six times, go on each time, and compare it with one that nothing happened to."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        home = prepared(folder)
        whole = run(home, "whole", "loader.num_workers=2")
        places = [draw.randrange(12, 34) for _ in range(6)]  # of about 200 passes in all
        codes = []
        for number, place in enumerate(places):
            workers = f"loader.num_workers={(0, 2)[number % 2]}"
            codes.append(start(home, "run", workers, "trainer.resume=true", KILL_AT=str(place)))
        end = run(home, "run", "loader.num_workers=0", "trainer.resume=true")
    return {
        "killed": sum(code == -signal.SIGKILL for code in codes),
        "after_passes": places,
        "resumed_from_step": end["resumed_from_step"],
        "same_weights": end["weights_sha256"] == whole["weights_sha256"],
        "same_metrics": end["metrics"] == whole["metrics"],
    }


def lacking(times: int) -> dict[str, Any]:
    """Let memory run out at places drawn at random; count what was read."""
    draw = random.Random(1)
    places = sorted(draw.sample(range(2, 4 * STEPS), times))
    with tempfile.TemporaryDirectory() as folder:
        home = prepared(folder)
        reads = {name: home / f"reads-{name}" for name in ("whole", "run")}
        run(home, "whole", "loader.num_workers=2", READS=str(reads["whole"]))
        found = run(
            home, "run", "loader.num_workers=2", "memory.max_recoveries_per_step=20",
            READS=str(reads["run"]), OOM_AT=",".join(map(str, places)),
        )  # fmt: skip
        counted = {n: Counter(path.read_text().splitlines()) for n, path in reads.items()}
    return {
        "events": len(found["oom_events"]),
        "status": found["status"],
        "steps": found["steps"],
        "samples_read": sum(counted["run"].values()),
        "lost_or_read_twice": sum(
            (counted["run"] - counted["whole"]).values()
        ) + sum((counted["whole"] - counted["run"]).values()),
    }  # fmt: skip


def worker_killed() -> dict[str, Any]:
    """Kill a worker process of a run; return what the run says, and whether it goes on."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        home = prepared(folder)
        process = subprocess.Popen(
            command("run", "loader.num_workers=2"), cwd=home, env=environment(home),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        progress = home / "run" / "checkpoints" / "last.pt"
        while process.poll() is None and not progress.exists():
            time.sleep(0.2)
        time.sleep(3)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [
            c for c in children if not c.children() and "forkserver" in " ".join(c.cmdline())
        ]
        workers[-1].kill()
        _, said = process.communicate(timeout=300)
        whole = run(home, "whole", "loader.num_workers=2")
        end = run(home, "run", "loader.num_workers=0", "trainer.resume=true")
    lines = said.strip().splitlines()
    return {
        "exit_code": process.returncode,
        "lines_on_stderr": len(lines),
        "said": last_words(said),
        "same_weights_after_resume": end["weights_sha256"] == whole["weights_sha256"],
    }


def prepared(folder: str) -> Path:
    home = Path(folder)
    (home / "faulty_clips.py").write_text(FAULTY)
    return home


def command(name: str, *more: str) -> list[str]:
    fixed = ("tracking=none", "trainer.progress=false", f"hydra.run.dir={name}")
    return [sys.executable, "-m", "expt", *LINE, *CLASSES, *fixed, *more]


def environment(home: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def start(home: Path, name: str, *more: str, **variables: str) -> int:
    """Return the exit code of a run."""
    return subprocess.run(
        command(name, *more), cwd=home, env=environment(home, **variables), capture_output=True,
        check=False,
    ).returncode  # fmt: skip


def run(home: Path, name: str, *more: str, **variables: str) -> dict[str, Any]:
    """Return the result of a run that ends as it should."""
    run_expt(
        *LINE, *CLASSES, f"hydra.run.dir={name}", *more, cwd=home, **environment(home, **variables)
    )
    found: dict[str, Any] = json.loads((home / name / "result.json").read_text())
    return found


def table(rows: Mapping[str, Any]) -> str:
    body = [
        (
            name,
            ", ".join(f"{key.replace('_', ' ')}: {row[key]}" for key in row if key not in SILENT),
        )
        for name, row in rows.items()
    ]
    text = f"A run on clips of {STEPS} steps, disturbed.\n\n"
    return text + markdown(("disturbance", "outcome"), body)


SILENT = ("date", "commit", "after_passes")
