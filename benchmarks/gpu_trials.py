"""Running out of memory for real and going on, and training to a deadline."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accuracy import METRICS, MODELS
from common import ROOT, do_step, make_trainer, settings_for
from gpu_correctness import distance, order

from expt.memory.measuring.budget import Budget
from expt.memory.techniques.techniques import apply
from expt.run.build import build
from expt.run.planner import plan_training

SHARE = 0.6
"""The budget, as a share of what the plain step is predicted to need."""
GRACE_SECONDS = 45
"""Between SIGTERM and giving up: finish the step, save, record."""


def recovery(preset: str, device: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Train inside a budget that the plain step does not fit; compare with a run that has room.

    The budget is enforced by the real allocator (on the CPU, by the ledger). Without dropout both
    end with the same weights to rounding.
    """
    given = [
        f"+memory={preset}", "data=metr_la_week", "model.dropout=0", "memory.precision=fp32",
        *overrides,
    ]  # fmt: skip
    settings = settings_for(*given)
    target: Any = device
    demand = plan_training(settings, build(settings, "data"), target, evaluation=False).demand_bytes
    budget = Budget.parse(int(SHARE * demand), torch.device(device))
    given.append(f"trainer.device={device}")
    free = run(given, steps, None)
    tight = run(given, steps, budget)
    return {
        "preset": preset,
        "predicted_demand_bytes": demand,
        "budget_bytes": budget.bytes,
        "steps": steps,
        "events": [
            {key: event[key] for key in ("phase", "step", "rung", "bytes_requested")}
            for event in tight["events"]
        ],
        "techniques": tight["techniques"],
        "peak_reserved_bytes": tight["peak_reserved_bytes"],
        "peak_allocated_bytes": tight["peak_allocated_bytes"],
        "free_peak_allocated_bytes": free["peak_allocated_bytes"],
        "weights_distance": distance(tight["weights"], free["weights"]),
    }


def run(overrides: list[str], steps: int, budget: Budget | None) -> dict[str, Any]:
    """Take steps, recovering where memory runs out; the peaks are those of the run."""
    device = torch.device("cuda" if "trainer.device=cuda" in overrides else "cpu")
    if device.type == "cuda":
        gc.collect()  # the trainer before this one is in cycles, and would count in the budget
        torch._C._cuda_clearCublasWorkspaces()  # and so would what its matrix products took
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with budget.enforce(device) if budget else nullcontext() as ledger:
        trainer = make_trainer(
            *overrides, apply=apply, budget_bytes=budget.bytes if budget else None
        )
        trainer.model.train()
        for number, samples in enumerate(order(trainer, steps)):
            trainer.recovery.position = (number, 0)
            with trainer.meter.step() if ledger is None else nullcontext():
                do_step(trainer, samples)
        peaks = trainer.meter if ledger is None else None
        allocated = ledger.peak_bytes if peaks is None else peaks.peak_allocated_bytes()
        return {
            "events": list(trainer.recovery.events),
            "techniques": dict(vars(trainer.recovery.techniques)),
            "weights": [weight.detach().cpu() for weight in trainer.model.parameters()],
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": None if peaks is None else peaks.peak_reserved_bytes(),
        }


def accuracy(
    model: str,
    data: str,
    seed: int,
    device: str,
    seconds: float,
    *overrides: str,
    group: str = "",
    anew: bool = False,
) -> dict[str, Any]:
    """Train from where it was left until it is done or the seconds are up; return where it is.

    Args:
        model: a key of `accuracy.MODELS`.
        data: a name of the group `data`.
        seed: of the run.
        device: cpu or cuda.
        seconds: to train; it then has `GRACE_SECONDS` to save itself.
        overrides: more settings of the configuration.
        group: the folder under outputs/gpu, of one card and one code.
        anew: from the beginning, whatever was left.

    """
    folder = ROOT / "outputs" / "gpu" / group / f"{model}-{data}-seed{seed}-{device}"
    command = [
        sys.executable, "-m", "expt", *MODELS[model], f"data={data}", f"trainer.seed={seed}",
        f"trainer.device={device}", "trainer.resume=true", "trainer.progress=false",
        f"hydra.run.dir='{folder}'", "tracking=none", *overrides,
    ]  # fmt: skip
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.parent / f"{folder.name}.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        try:
            process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it finishes the step, saves and records
            try:
                process.wait(timeout=GRACE_SECONDS)
            finally:
                process.kill()  # or it would train on, beside the one that resumes it
    if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
        tail = output.read_text(encoding="utf-8")[-1000:]
        raise RuntimeError(f"training {model} failed ({process.returncode}): {tail}")
    return state(folder, model, data, seed, time.monotonic() - started)


def state(folder: Path, model: str, data: str, seed: int, seconds: float) -> dict[str, Any]:
    """Return what a run has come to; `done` says that it was tested."""
    place = {"model": model, "data": data, "seed": seed, "seconds_this_time": seconds}
    stored = folder / "history.json"  # there is none before the first epoch is over
    history = json.loads(stored.read_text("utf-8")) if stored.exists() else []
    if not (folder / "result.json").exists():  # ended before it had begun
        return {**place, "done": False, "epochs": len(history)}
    result = json.loads((folder / "result.json").read_text("utf-8"))
    epochs = [row["seconds"] for row in history]
    spans = [after - before for before, after in zip([0.0, *epochs], epochs, strict=False)]
    metrics = result["metrics"]
    return {
        **place,
        "done": result["status"] == "completed",
        "stop_reason": result["stop_reason"],
        "epochs": len(history),
        "seconds_per_epoch": sorted(spans)[len(spans) // 2] if spans else None,
        "best_val": min((row["val"] for row in history), default=None),
        "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "memory": result["memory"],
        "history": [{key: row[key] for key in ("epoch", "seconds", "val")} for row in history],
    }
