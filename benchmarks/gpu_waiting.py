"""Does an epoch wait for the device: torch raises where it does; on a CPU, readings are counted.

Watched is the loop of an epoch as a run has it: rates, steps, averages, sums, the loss of now and
then (copied, and awaited by an event, which torch allows), display, progress file. Left out is
what may wait, once an epoch: the order's move to the device, validation, and checkpoints.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from common import make_trainer
from gpu_correctness import common
from torch import Tensor
from torch.overrides import TorchFunctionMode

WARM_STEPS = 8
"""Before torch raises: a step is captured in the fourth, and capturing may wait."""
READING = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"}


class Readings(TorchFunctionMode):
    """Counts the calls by which the host reads values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Strict:
    """Does steps; from the ninth on, whoever waits for the device gets an error."""

    def __init__(self, run: Any) -> None:
        self.run, self.taken = run, 0

    def __call__(self, samples: Any) -> tuple[Tensor, Tensor]:
        """Do a step."""
        if self.taken == WARM_STEPS and samples.indices.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        self.taken += 1
        found: tuple[Tensor, Tensor] = self.run(samples)
        return found


def waiting(device: str, steps: int, *small: str) -> dict[str, Any]:
    """Run the loop of an epoch of so many steps and then of twice as many; return what was read.

    Raises:
        RuntimeError: the host waited for the device (CUDA).
        AssertionError: the longer epoch read more values than the shorter one.
        ValueError: an epoch of the data has fewer steps than the longer one and its first eight.

    """
    found = [epoch(device, count, *small) for count in (steps, 2 * steps)]
    readings = [row["readings"] for row in found]
    assert readings[0] == readings[1], f"readings grow with the steps: {readings}"
    return {"checked": device == "cuda", **found[1]}


def epoch(device: str, steps: int, *small: str) -> dict[str, Any]:
    """Run the loop of an epoch; return its sum of losses, and on a CPU how often it read.

    `steps` are those after the first eight, as is `steps` of what is returned.
    """
    length = WARM_STEPS + steps
    trainer = make_trainer(
        *common(device), *small, "trainer.checkpoint_every_steps=null",
        f"trainer.steps_per_epoch={length}", "trainer.log_every_steps=10",
    )  # fmt: skip
    most = trainer.steps_per_epoch
    if most < length:  # it would end early, and the longer epoch be no longer than the other
        raise ValueError(f"an epoch has {most} steps, and {length} are asked for")
    trainer._read_loss_every = 10 * length  # copies on a CPU are readings
    if device == "cuda":
        trainer._read_loss_every = trainer.settings.log_every_steps
    trainer.steps.run = strict = Strict(trainer.steps.run)
    trainer._started = time.monotonic()
    trainer.model.train()
    sums: list[float] = []
    trainer._validate = lambda loss_sum, weight_sum: sums.append(loss_sum)
    readings = Readings()
    try:
        with nullcontext() if device == "cuda" else readings:
            trainer._epoch()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    captured = bool(getattr(trainer.steps, "captured", False))
    return {
        "steps": strict.taken - WARM_STEPS,
        "readings": dict(readings.seen),
        "captured": captured,
        "sum": sums[0],
    }
