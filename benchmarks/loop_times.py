"""Seconds per optimizer step: our loop, a bare PyTorch loop, lightning's Trainer.

All train the same model on the same windows with the same batch size, loss, optimizer, clipping
and schedule, in one process and in rounds that alternate between them, so that a busy machine
slows all alike. Set-up and the first steps of a round are not counted. Ours runs as in a real
run, but for the tracker, whose cost is a measurement of its own (`bookkeeping`).
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from common import make_trainer, settings_for
from rival_loops import WARM_STEPS, Rivals, bare_seconds, lightning_seconds, now

from expt.progress import LineDisplay


def measure(preset: str, device: str, rounds: int, steps: int, *overrides: str) -> dict[str, Any]:
    """Return the seconds per step of every contender: each round's, and the medians."""
    given = [f"+memory={preset}", f"trainer.device={device}", *overrides]
    rivals = Rivals(settings_for(*given), device)
    contenders: dict[str, Callable[[int], float]] = {
        "ours": lambda count: our_seconds(given, count),
        "bare loop": lambda count: bare_seconds(rivals, count),
    }
    if importlib.util.find_spec("pytorch_lightning"):
        contenders["lightning"] = lambda count: lightning_seconds(rivals, count)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in islice(cycle(names), number, number + len(names)):
            times[name].append(contenders[name](steps) / steps)
    row: dict[str, Any] = {"preset": preset, "steps_per_round": steps}
    for name, values in times.items():
        row[name] = {"seconds_per_step": statistics.median(values), "rounds": values}
    for name in names[1:]:
        ratios = [one / other for one, other in zip(times["ours"], times[name], strict=True)]
        row[name]["ours_over_it"] = statistics.median(ratios)
    return row


class Clock(LineDisplay):
    """The display of a run that writes to a file, which also notes when a step was done."""

    def __init__(self, device: torch.device, at: tuple[int, ...]) -> None:
        super().__init__()
        self._device, self._at = device, at
        self.done: list[float] = []

    def step(self, step: int, loss: float | None) -> None:
        """Show the step, and note the time if it is one of those to note."""
        super().step(step, loss)
        if step in self._at:
            self.done.append(now(self._device))

    def epoch(self, line: str, val: float, peak_bytes: int | None) -> None:
        """Do not print: the figures of so short a run mean nothing."""


def our_seconds(overrides: list[str], steps: int) -> float:
    """Run our loop as a run does: gathering, rates, meter, display, progress file."""
    total = WARM_STEPS + steps
    trainer = make_trainer(*overrides, f"trainer.max_steps={total}", "trainer.eval_batches=1")
    trainer.display = clock = Clock(trainer.fabric.device, (WARM_STEPS, total))
    trainer.fit()
    first, last = clock.done
    return last - first
