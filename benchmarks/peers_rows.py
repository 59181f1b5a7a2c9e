"""The models that `peers.py` compares: how each is trained, and what a step of it costs."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MINUTES = 60.0
"""CPU time that every row is trained for, validation and the start of every slice included."""
SEARCH_MINUTES = 30.0
"""CPU time that a search has before its winner is trained."""
WARM_UP, TIMED = 3, 5
"""Steps before those that are measured, and how many are timed."""
SEEDS = (0, 1, 2)
DATA = ("metr_la_29", "pems_bay")
PEMS_BAY = "EXPT_PEMS_BAY"
"""Names the user's file; that of 67 sensors will do."""


@dataclass(frozen=True)
class Peer:
    """A model with its settings; with `budget`, the winner of a search inside it."""

    settings: tuple[str, ...]
    ours: bool = False
    seeds: tuple[int, ...] = SEEDS
    budget: str | None = None
    trained: bool = True


def searched(budget: str) -> Peer:
    settings = ("experiment=accuracy", "optimizer.weight_decay=0.1")
    return Peer(settings, ours=True, budget=budget)


SHARE_OF_TRIAL = 20
"""A trial of a search has the twentieth part of the time of a seed, and of its steps."""
SEARCH = (
    "search=alternating", "hydra/sweeper/sampler=gp", "hydra.sweeper.sampler.n_startup_trials=5",
    "trainer.epochs=4", "trainer.steps_per_epoch=300", "trainer.early_stopping_patience=null",
    f"trainer.time_limit_seconds={60 * MINUTES / SHARE_OF_TRIAL:g}",
    "data.batch_size=8", "model.dropout=0.2", "model.sensor_dropout=0.1", "memory.precision=fp32",
    "optimizer.lr=1e-3",
)  # fmt: skip
"""Sizes are searched for. What keeps a long training from overfitting would only harm in a short
one, the rate that is best in a short one is too high for a long one (docs/log.md), and of larger
batches a step counts as one all the same: these are the experiment's.
"""

# What is trained is that of the papers, or of our own experiments: sizes, batch, optimizer, rates.
# Budgets are the peak of STID, a fifth of that of STAEformer, and about that of the largest peers;
# minimal's micro-batches are those that memory.on_overflow=adapt chooses for it in 24 MiB, on 29.
PEERS: Mapping[str, Peer] = {
    "persistence": Peer(
        ("model=persistence", "trainer.epochs=1", "data.batch_size=64"), seeds=(0,), trained=False
    ),
    "historical average": Peer(
        ("model=historical_average", "trainer.epochs=1", "data.batch_size=64"),
        seeds=(0,),
        trained=False,
    ),
    "DLinear": Peer(("experiment=dlinear",)),
    "STID": Peer(("experiment=stid",)),
    "Graph WaveNet": Peer(("experiment=graph_wavenet",)),
    "STAEformer": Peer(("experiment=staeformer",), seeds=(0,)),
    "minimal in micro-batches": Peer(
        (
            "+memory=minimal",
            "experiment=accuracy",
            "memory.gradient_accumulation=4",
            "memory.forward_chunks=4",
        ),
        ours=True,
    ),
    "minimal": Peer(("+memory=minimal", "experiment=accuracy"), ours=True),
    "lite": Peer(("+memory=lite", "experiment=accuracy"), ours=True),
    "full": Peer(("+memory=full", "experiment=accuracy"), ours=True, seeds=(0,)),
    "search 24 MiB": searched("24MiB"),
    "search 54 MiB": searched("54MiB"),
    "search 256 MiB": searched("256MiB"),
}


def data_settings(data: str) -> tuple[str, ...]:
    """Return the settings that choose the series; its file is in the environment, not in them.

    Raises:
        SystemExit: the environment does not name PEMS-BAY's file.

    """
    if data == "metr_la_29":
        return ("data=metr_la_29",)
    if not os.environ.get(PEMS_BAY):
        raise SystemExit(f"{PEMS_BAY} does not name the file of PEMS-BAY, which is not shipped")
    return ("data=pems_bay", "data.expected_sensors=null")


def measured_cost(settings: Sequence[str]) -> dict[str, Any]:
    """Return parameters, predicted and measured peaks, and CPU times, of one model in one process.

    The peak is the higher one of a training step and of an evaluation batch, as a plan has it.
    """
    import torch
    from common import settings_for
    from planned_steps import ours
    from prediction import profiled_peak

    from expt.run.build import build
    from expt.run.planner import plan_training

    torch.set_num_threads(1)
    chosen = settings_for(*settings)
    data = build(chosen, "data")
    card = plan_training(chosen, data, "cuda")
    made = ours(list(settings), "cpu")
    for _ in range(WARM_UP):
        made.parts[0]()
    peaks = [profiled_peak(*pair) for pair in zip(made.parts, made.live, strict=True)]
    step, evaluation = (cpu_seconds(part) for part in made.parts)
    return {
        "settings": list(settings),
        "sensors": int(data.series.values.shape[1]),
        "parameters": parameters(chosen, data),
        "batch_size": data.batch_size,
        "steps_per_epoch": math.ceil(data.size("train") / data.batch_size),
        "batches_of_validation": math.ceil(data.size("val") / data.eval_batch_size),
        "epochs_at_most": chosen.trainer.epochs,
        "predicted_bytes": made.predicted.peak_bytes,
        "predicted_cuda_bytes": card.peak_bytes,
        "measured_bytes": max(peaks),
        "measured_step_bytes": peaks[0],
        "step_seconds": step,
        "evaluation_seconds": evaluation,
    }


def parameters(settings: Any, data: Any) -> int:
    """Count the parameters of the configured model."""
    from expt.run.build import build_model
    from expt.training.batches import Examples

    model = build_model(settings, data, Examples(data).input_names())
    return sum(weight.numel() for weight in model.parameters())


def cpu_seconds(part: Callable[[], object]) -> float:
    """Return the CPU time of one call, the median of some: others may use the machine too."""
    found = []
    for _ in range(TIMED):
        begun = time.process_time()
        part()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def steps_that_fit(cost: Mapping[str, Any]) -> int:
    """Return how many steps the time is enough for; the schedule of the rate is laid over them."""
    steps = cost["steps_per_epoch"]
    epoch = (
        steps * cost["step_seconds"] + cost["batches_of_validation"] * cost["evaluation_seconds"]
    )
    return max(1, min(int(60 * MINUTES / epoch * steps), int(cost["epochs_at_most"]) * steps))
