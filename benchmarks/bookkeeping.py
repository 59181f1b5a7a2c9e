"""What part of an epoch goes into tracking, memory bookkeeping and progress.

One run with everything on (an existing MLflow database, the meter, the bar of a terminal) has
each call into them timed. Costs per step are taken times the steps of a true epoch; what happens
once a run (the plan; the ledger's steps, on devices without an allocator to ask) is counted whole
against that one epoch, as in a run of one epoch. Threads in the background count with their CPU
time, since it is taken from the training where cores are scarce. Checkpoints are reported beside
it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import make_trainer, settings_for
from rich.console import Console
from rival_loops import now

from expt.memory.measuring.meter import LEDGER_STEPS
from expt.run.guard import manager_for
from expt.run.planner import plan_training
from expt.run.target import target_of
from expt.tracking.mlflow import MlflowTracker
from expt.training.display import BarDisplay

WARM_STEPS = 3
"""Steps before the run: what is made in the first ones is no bookkeeping."""
TRACKER_THREAD, BAR_THREAD = "tracker's thread", "bar's thread"


class Stopwatch:
    """Adds up the seconds spent in functions, by name; in the main thread only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, target: object, *methods: str) -> None:
        """Time these methods of an object."""
        self.seconds.setdefault(name, 0.0)
        for method in methods:
            setattr(target, method, partial(self.timed, name, getattr(target, method)))

    def timed(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call, and add the time it took to `name`."""
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[name] += time.perf_counter() - start


def measure(preset: str, device: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Train `steps` steps and one evaluation batch; return every cost and its share of an epoch."""
    lines = (
        f"+memory={preset}",
        f"trainer.device={device}",
        f"trainer.max_steps={steps}",
        "trainer.eval_batches=1",
        *overrides,
    )
    settings = settings_for(*lines)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as sink:
        trainer = make_trainer(*lines)
        planning = time.perf_counter()
        plan_training(settings, trainer.data, target_of(settings.trainer, device))
        plan_seconds = time.perf_counter() - planning
        trainer.tracker = tracker = open_tracker(Path(folder))
        trainer.manager = manager_for(settings.memory, trainer.fabric.device)
        trainer.display = BarDisplay(Console(file=sink, force_terminal=True, width=120))
        for samples in trainer.batches.training(0, 0, WARM_STEPS):
            trainer.train_step(samples)
        watch, step_seconds = Stopwatch(), timed_steps(trainer)
        watch.wrap("tracker", tracker, "metrics", "tags", "artifact")
        watch.wrap("display", trainer.display, "step", "epoch")
        watch.wrap("progress file", trainer.progress_file, "write")
        watch.wrap("meter", trainer.meter, "step", "evaluation", "start_epoch", "epoch")
        watch.wrap("memory manager", trainer.manager, "step", "line", "now")
        background = background_at_stop(trainer)
        trainer.fit()
        saving = time.perf_counter()
        trainer._save_last()
        checkpoint_seconds = time.perf_counter() - saving
        tracker.finish("FINISHED")
    step = statistics.median(step_seconds[LEDGER_STEPS:])
    watched = sum(step_seconds[:LEDGER_STEPS]) - LEDGER_STEPS * step
    true_steps = -(-trainer.data.size("train") // trainer.data.batch_size)
    epoch_seconds = true_steps * step
    parts = {name: seconds / steps / step for name, seconds in watch.seconds.items()}
    parts |= {name: seconds / steps / step for name, seconds in background.items()}
    parts["plan, once a run"] = plan_seconds / epoch_seconds
    if trainer.meter.name.startswith("ledger"):
        parts["ledger, once a run"] = max(watched, 0.0) / epoch_seconds
    return {
        "preset": preset,
        "steps": steps,
        "seconds_per_step": step,
        "steps_of_an_epoch": true_steps,
        "shares_of_an_epoch": parts,
        "share": sum(parts.values()),
        "seconds_per_checkpoint": checkpoint_seconds,
    }


def open_tracker(folder: Path) -> MlflowTracker:
    """Return a tracker whose run is open, in a database that was there before."""
    for name in ("earlier", "run"):
        (folder / name).mkdir()
        tracker = MlflowTracker(
            f"sqlite:///{folder / 'mlflow.db'}", "expt", folder / name, folder / "artifacts"
        )
        tracker.start(name, {"batch_size": 1}, {"model": "any"})
        if not tracker.flush():
            raise RuntimeError(f"the database in {folder} could not be opened in time")
        if name == "earlier":
            tracker.finish("FINISHED")
    return tracker


def timed_steps(trainer: Any) -> list[float]:
    """Note how long each optimizer step takes, with the meter's watching and nothing else."""
    seconds: list[float] = []
    step = trainer.steps.run

    def timed(samples: Any) -> Any:
        start = now(trainer.fabric.device)
        result = step(samples)
        seconds.append(now(trainer.fabric.device) - start)
        return result

    trainer.steps.run = timed
    return seconds


def background_at_stop(trainer: Any) -> dict[str, float]:
    """Return the CPU seconds of the tracker's and the bar's threads, filled in when training ends.

    The bar's thread starts with the run and ends with it, hence the look just before.
    """
    used = {TRACKER_THREAD: 0.0, BAR_THREAD: 0.0}
    before = {thread: cpu_seconds(thread) for thread in threading.enumerate()}
    stop = trainer.display.stop

    def count_and_stop() -> None:
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                name = TRACKER_THREAD if thread.name == "expt-tracking" else BAR_THREAD
                used[name] += cpu_seconds(thread) - before.get(thread, 0.0)
        stop()

    trainer.display.stop = count_and_stop
    return used


def cpu_seconds(thread: threading.Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
