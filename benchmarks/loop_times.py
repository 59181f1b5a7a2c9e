"""Seconds per optimizer step: our loop, a bare PyTorch loop, lightning's Trainer.

All train the same model on the same windows with the same batch size, loss, optimizer, clipping
and schedule, each in a process of its own, as a user's would be, and in rounds that alternate
between them, so that a busy machine slows all alike. Set-up and the first steps of a round are
not counted. Ours runs as in a real run, but for the tracker, whose cost is a measurement of its
own (`bookkeeping`). `speed.py` calls `measure`; run as a program, this file is one contender's
round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from common import last_words, make_trainer, settings_for
from rival_loops import WARM_STEPS, Rivals, bare_seconds, lightning_seconds, now

from expt.training.display import LineDisplay

OURS, BARE, LIGHTNING = "ours", "bare loop", "lightning"


def measure(
    preset: str, device: str, rounds: int, steps: int, lightning: Path | None, *overrides: str
) -> dict[str, Any]:
    """Return the seconds per step of every contender: each round's, and the medians.

    Args:
        preset: whose model and batch.
        device: cpu or cuda.
        rounds: processes per contender.
        steps: counted in each.
        lightning: the folder that lightning was installed into; None leaves it out.
        overrides: more settings of the configuration.

    """
    names = [OURS, BARE] + ([LIGHTNING] if lightning is not None else [])
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in islice(cycle(names), number % len(names), number % len(names) + len(names)):
            command = [sys.executable, __file__, name, device, str(steps), str(lightning or "")]
            command += [f"+memory={preset}", *overrides]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0 and name == LIGHTNING:  # the others are worth having
                failed[name] = last_words(done.stderr)
                continue
            if done.returncode != 0:
                raise RuntimeError(f"the loop {name!r} failed: {done.stderr.strip()[-400:]}")
            times[name].append(float(done.stdout.splitlines()[-1]) / steps)
    for name in failed:
        del times[name]
        names.remove(name)
    row: dict[str, Any] = {"preset": preset, "steps_per_round": steps, "failed": failed}
    for name, values in times.items():
        row[name] = {"seconds_per_step": statistics.median(values), "rounds": values}
    for name in names[1:]:
        ratios = [one / other for one, other in zip(times[OURS], times[name], strict=True)]
        row[name]["ours_over_it"] = statistics.median(ratios)
    return row


def main() -> None:
    """Run one contender once and print its seconds."""
    name, device, steps, folder, *overrides = sys.argv[1:]
    given = [*overrides, f"trainer.device={device}"]
    if name == OURS:
        print(our_seconds(given, int(steps)))
        return
    if name == LIGHTNING:
        sys.path.append(folder)
    contender = {BARE: bare_seconds, LIGHTNING: lightning_seconds}[name]
    print(contender(Rivals(settings_for(*given), device), int(steps)))


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


if __name__ == "__main__":
    main()
