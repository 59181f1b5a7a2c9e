"""What the live monitor costs a training: epochs with and without it, and a look from outside.

    python benchmarks/monitor.py [--again] [--only SECTION]

Rounds of steps alternate in one process, each pair once in either order: without a monitor
(`memory.watch=false`), and with it (a reading a second, alarms, the line that is shown, the
readings in ``progress.json``). CPU seconds of the process stand beside wall seconds, which a busy
machine spoils; the seconds spent in the monitor's own calls are timed as well. A look of
`task=watch` is made at this very process, and its CPU seconds are counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from common import (
    do_step,
    load,
    make_trainer,
    markdown,
    measure_sections,
    settings_for,
    source_line,
)
from scipy.stats import binom

from expt.commands.watch.session import Session
from expt.commands.watch.targets import RunTarget
from expt.config.command_nodes import WatchConfig
from expt.locks import run_lock
from expt.memory.watching.manager import MemoryManager
from expt.run.guard import manager_for
from expt.training.display import LineDisplay, ProgressFile

PRESETS = ("minimal", "lite")
WARM_STEPS = 8
PAIRS = 40
ROUND_SECONDS = 1.0
"""Of a round, short so that both of a pair meet the same machine; each has a reading."""
LOOKS = 60
RESOLVED = 0.01
"""A difference that the pairs should tell from none: an interval within so much of its middle."""


class Loop:
    """Steps of a trainer with what the loop does for the monitor, timed by itself."""

    def __init__(self, trainer: Any, manager: MemoryManager, folder: Path) -> None:
        self.trainer, self.manager = trainer, manager
        self.display, self.inside, self.step = LineDisplay(), 0.0, 0
        self.file = ProgressFile(folder, "val/mae")

    def run(self, steps: int) -> dict[str, float]:
        """Do so many steps; return wall and CPU seconds, and those in the monitor."""
        batches = cycle(list(self.trainer.batches.training(0, 0, WARM_STEPS)))
        self.inside = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        for samples in islice(batches, steps):
            do_step(self.trainer, samples)
            self.step += 1
            began = time.perf_counter()
            if self.manager.step():
                self.display.memory(self.manager.line())
            held = self.manager.now()
            self.inside += time.perf_counter() - began
            self.file.write(self.step, 0, None, memory=lambda held=held: held)
        return {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "inside": self.inside,
        }


def measure_epochs(preset: str) -> dict[str, Any]:
    """Return an epoch's seconds with and without the monitor, and the median ratio of pairs.

    The interval of a median is between the ranks that leave out 2.5 % of a fair coin's throws.
    """
    lines = (f"+memory={preset}", "trainer.device=cpu")
    trainer, settings = make_trainer(*lines), settings_for(*lines)
    with tempfile.TemporaryDirectory() as folder:
        watching = manager_for(settings.memory, trainer.fabric.device)
        loops = {
            "without": Loop(trainer, MemoryManager(monitoring=False), Path(folder) / "without"),
            "with": Loop(trainer, watching, Path(folder) / "with"),
        }
        warm = loops["without"].run(WARM_STEPS)["wall"] / WARM_STEPS
        steps = max(round(ROUND_SECONDS / warm), 4)
        loops["with"].run(steps)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
        for number in range(PAIRS):
            for name in list(loops)[:: 1 if number % 2 else -1]:
                rounds[name].append(loops[name].run(steps))
    epoch = -(-trainer.data.size("train") // trainer.data.batch_size)
    pairs = list(zip(rounds["with"], rounds["without"], strict=True))
    found: dict[str, Any] = {"steps_of_a_round": steps, "pairs": PAIRS, "steps_of_an_epoch": epoch}
    for clock in ("wall", "cpu"):
        ratios = sorted(on[clock] / off[clock] - 1 for on, off in pairs)
        low = int(binom.ppf(0.025, len(ratios), 0.5))
        found[f"{clock}_difference"] = statistics.median(ratios)
        found[f"{clock}_interval"] = [ratios[low], ratios[-low - 1]]
        for name, own in rounds.items():
            seconds = statistics.median(row[clock] for row in own) / steps
            found[f"{clock}_epoch_seconds_{name}"] = seconds * epoch
    found["share_in_the_monitor"] = sum(on["inside"] for on, _ in pairs) / sum(
        on["wall"] for on, _ in pairs
    )
    return found


def measure_looks() -> dict[str, Any]:
    """Return the CPU seconds of a look of `task=watch` at a run, with its line and forecast."""
    interval = WatchConfig().interval
    with tempfile.TemporaryDirectory() as name, run_lock(Path(name)):
        folder = Path(name)
        file = ProgressFile(folder / "checkpoints", "val/mae")
        target, session = RunTarget(folder, None), Session(WatchConfig().alarm)
        budget = {"allocated_bytes": 5, "peak_bytes": 7, "total_bytes": 10}
        for step in range(8):  # with the imports
            look(target, session, file, step, budget)
        began = time.process_time()
        for step in range(LOOKS):
            look(target, session, file, step, budget)
        seconds = (time.process_time() - began) / LOOKS
    return {"looks": LOOKS, "cpu_seconds": seconds, "share_of_a_core": seconds / interval}


def look(target: Any, session: Session, file: ProgressFile, step: int, budget: Any) -> None:
    file.write(step, 0, None, force=True, memory=lambda: {"budget": {**budget, "step": step}})
    session.add(target.look(float(step)))
    session.words()


def epochs() -> Mapping[str, Callable[[], dict[str, Any]]]:
    return {preset: lambda preset=preset: measure_epochs(preset) for preset in PRESETS}


def looks() -> Mapping[str, Callable[[], dict[str, Any]]]:
    return {"a run": measure_looks}


def summary(record: Mapping[str, Any]) -> str:
    """Return the tables."""
    epochs = record.get("epochs", {})
    rows = [
        [
            preset,
            f"{row['share_in_the_monitor']:.3%}",
            f"{row['cpu_difference']:+.2%} ({interval(row['cpu_interval'])})",
            f"{row['wall_difference']:+.2%} ({interval(row['wall_interval'])})",
            f"{row['cpu_epoch_seconds_without']:.0f}",
            f"{row['cpu_epoch_seconds_with']:.0f}",
        ]
        for preset, row in epochs.items()
    ]
    heads = [
        "monitor", "wall time in its calls", "CPU, median of pairs (95 %)", "wall, the same",
        "CPU s an epoch, without", "with",
    ]  # fmt: skip
    text = markdown(heads, rows) + "".join(f"\n{line}\n" for line in remarks(epochs))
    for row in record.get("looks", {}).values():
        text += (
            f"\nA look of `task=watch` takes {1e3 * row['cpu_seconds']:.1f} ms of CPU in its own "
            f"process, {row['share_of_a_core']:.2%} of a core at the default interval.\n"
        )
    return f"{text}\n{source_line(record, 'monitor')}"


def remarks(epochs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what the table shows, and what it cannot."""
    if not epochs:
        return []
    rows = list(epochs.values())
    shares = " and ".join(f"{row['share_in_the_monitor']:.3%}" for row in rows)
    found = [f"Readings, alarms and the line, timed in the loop, take {shares} of the time."]
    unresolved = [
        name
        for name, row in epochs.items()
        if any(
            high - low > 2 * RESOLVED for low, high in (row["cpu_interval"], row["wall_interval"])
        )
    ]
    if unresolved:
        found[0] += (
            f" The pairs with and without it cannot resolve a difference of {RESOLVED:.0%} on this "
            f"machine ({' and '.join(unresolved)}): their intervals are wider."
        )
    rounds = " and ".join(dict.fromkeys(f"{row['steps_of_a_round']}" for row in rows))
    found[0] += f" Seconds of an epoch are medians of rounds of {rounds} steps, scaled up."
    return found


def interval(values: list[float]) -> str:
    return f"{values[0]:+.2%} to {values[1]:+.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure what is stored already")
    parser.add_argument("--only", default="", choices=("", "epochs", "looks"))
    arguments = parser.parse_args()
    record: dict[str, Any] = {"epochs": {}, "looks": {}, **load("monitor")}
    sections = {"epochs": epochs, "looks": looks}
    measure_sections("monitor", record, sections, summary, arguments.again, arguments.only)


if __name__ == "__main__":
    main()
