"""`task=rollout`: how often a run's policy solves its tasks, in the simulator of its data.

    python -m expt task=rollout rollout.run=RUN_DIR

The best weights act closed-loop: they see, predict a chunk of actions, and `rollout.execute` of
them are done before they see again. Every task is tried in scenes that no demonstration has, and
again with the sentences of the other tasks: who solves a task when told to do another does not
listen. A table, ``rollout.json`` and videos are written into the output directory. What is
particular to a job is in its data set: `expt.job.Simulated`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table
from torch import nn

from expt.commands.predict import open_for
from expt.config.command_nodes import RolloutConfig
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError, ExptError
from expt.files import write_json, write_text
from expt.job import DataSet, Simulated, Trial
from expt.run.saved import load
from expt.tables import markdown_table, print_table
from expt.tracking.tracker import open_tracker
from expt.training.device import make_fabric
from expt.training.evaluate import predict

FILE_NAME, TABLE, VIDEOS = "rollout.json", "rollout.md", "videos"


@dataclass(frozen=True)
class RolloutResult:
    """What ``rollout.json`` holds, and the videos."""

    record: dict[str, Any]
    videos: tuple[Path, ...] = ()
    exit_code: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """Success, of each task and over all, from 0 to 1."""
        return cast("dict[str, float]", self.record["metrics"])


def run(cfg: DictConfig, context: RunContext) -> RolloutResult:
    """Let the policy act, and write how it went.

    Raises:
        ConfigError: a setting is wrong, the run has no weights, or its data no simulator.

    """
    node = cast(RolloutConfig, OmegaConf.to_object(cfg.rollout))
    if problems := node.problems():
        raise ConfigError(problems)
    settings = validated(cfg, context.overridden)
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    saved = load(str(node.run))
    data, _ = open_for(saved, settings, context)
    if not isinstance(data, Simulated):
        raise ConfigError(
            f"rollout.run={node.run}: there is no simulator for its data "
            f"({type(data).__name__}); task=predict measures errors on demonstrations"
        )
    model = fabric.setup(saved.model)
    player = Player(data, model, fabric.device, node, context.run_dir / VIDEOS)
    started = time.perf_counter()
    trials = trials_of(data, node)
    done = [entry for group in _groups(trials, node.at_once) for entry in player.play(group)]
    for note in player.notes:
        print(f"note: {note}")
    record = {
        "run": str(saved.run_dir),
        "step": saved.step,
        "steps": node.steps,
        "execute": player.execute,
        "seeds": list(data.fresh_seeds(node.seeds)),
        "metrics": figures(done),
        "seconds": time.perf_counter() - started,
        "trials": done,
        "videos": [str(path.relative_to(context.run_dir)) for path in player.videos],
        "data_fingerprint": cast(DataSet, data).fingerprint(),
    }
    write_json(context.run_dir / FILE_NAME, record)
    rows = table_of(done)
    write_text(context.run_dir / TABLE, markdown_table(rows, right=range(1, len(rows[0]))))
    _print(rows, record, context.run_dir)
    _track(settings, context, record, player.videos)
    return RolloutResult(record, tuple(player.videos))


def trials_of(data: Simulated, node: RolloutConfig) -> list[Trial]:
    """Return the trials: every task with every seed, and again told of the other tasks in turn.

    Raises:
        ConfigError: there is no other task whose sentence could be told.

    """
    tasks = list(node.tasks or data.simulated_tasks)
    seeds = data.fresh_seeds(node.seeds)
    found = [Trial(task, seed, task) for task in tasks for seed in seeds]
    if not node.exchange_sentences:
        return found
    everything = list(dict.fromkeys([*tasks, *data.simulated_tasks]))
    if len(everything) == 1:
        raise ConfigError(
            f"rollout.exchange_sentences=true: {everything[0]} is the only task, so that there is "
            "no other sentence; rollout.exchange_sentences=false leaves it out"
        )
    for place, task in enumerate(tasks):
        others = [other for other in everything if other != task]
        found += [
            Trial(task, seed, others[(place + number) % len(others)])
            for number, seed in enumerate(seeds)
        ]
    return found


class Player:
    """Lets a model act in groups of trials, and films some of them.

    Attributes:
        execute: steps of a prediction that are done before the next one.
        videos: what was filmed.
        notes: why something was not.

    """

    def __init__(
        self,
        data: Simulated,
        model: nn.Module,
        device: torch.device,
        node: RolloutConfig,
        folder: Path,
    ) -> None:
        self._data, self._model, self._device = data, model, device
        self._node, self._folder = node, folder
        self.execute = node.execute
        self.videos: list[Path] = []
        self.notes: list[str] = []
        self._filmed: dict[str, int] = {}

    def play(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Return how each of some trials went."""
        simulator = self._data.simulator(trials, self._node.steps)
        try:
            while simulator.running:
                seen = simulator.observe().each(lambda value: value.to(self._device))
                predicted = predict(self._model, seen).float().cpu()
                if self.execute is None:
                    self.execute = max(predicted.shape[-2] // 2, 1)
                simulator.act(predicted, self.execute)
            for number, trial in enumerate(trials):
                self._film(simulator.film, number, trial)
            outcomes = zip(trials, simulator.solved, simulator.steps, strict=True)
            return [
                {**vars(trial), "solved": solved, "steps": steps}
                for trial, solved, steps in outcomes
            ]
        finally:
            simulator.close()

    def _film(self, film: Any, number: int, trial: Trial) -> None:
        count = self._filmed.get(trial.task, 0)
        if trial.told != trial.task or count >= self._node.videos or self.notes:
            return
        path = self._folder / f"{trial.task}_{trial.seed}.mp4"
        try:
            film(number, path)
        except ExptError as error:
            self.notes.append(f"there are no videos: {error}")
            return
        self._filmed[trial.task] = count + 1
        self.videos.append(path)


def figures(done: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return success from 0 to 1: of each task and their mean; the same with other sentences."""
    found: dict[str, float] = {}
    for name, own in (("success", True), ("exchanged", False)):
        rates = {
            task: _rate(entries)
            for task in dict.fromkeys(entry["task"] for entry in done)
            if (entries := [e for e in done if e["task"] == task and (e["told"] == task) is own])
        }
        if rates:
            found[name] = sum(rates.values()) / len(rates)
            found |= {f"{name}_{task}": rate for task, rate in rates.items()}
    return found


def table_of(done: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of a table, its heads first and the mean last."""
    measured = figures(done)
    exchanged = "exchanged" in measured
    heads = ["task", "success", "mean steps", *(["sentences exchanged"] if exchanged else [])]
    rows = [heads]
    for task in dict.fromkeys(entry["task"] for entry in done):
        own = [e for e in done if e["task"] == task and e["told"] == task]
        other = [e for e in done if e["task"] == task and e["told"] != task]
        steps = [e["steps"] for e in own if e["solved"]]
        mean = f"{sum(steps) / len(steps):.0f}" if steps else "-"
        rows.append([task, _count(own), mean, *([_count(other)] if exchanged else [])])
    last = ["mean", f"{measured['success']:.3f}", ""]
    rows.append([*last, *([f"{measured['exchanged']:.3f}"] if exchanged else [])])
    return rows


def _rate(entries: Sequence[Mapping[str, Any]]) -> float:
    return sum(bool(entry["solved"]) for entry in entries) / len(entries)


def _count(entries: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(bool(entry['solved']) for entry in entries)} of {len(entries)}"


def _groups(trials: Sequence[Trial], size: int) -> Iterator[Sequence[Trial]]:
    for first in range(0, len(trials), size):
        yield trials[first : first + size]


def _print(rows: Sequence[Sequence[str]], record: Mapping[str, Any], folder: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for number, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    print(
        f"rollouts: {len(record['trials'])} in {record['seconds']:.0f} s with the weights of step "
        f"{record['step']}, {record['execute']} actions at a time"
    )
    print_table(table)
    print(f"written: {folder / FILE_NAME}")


def _track(
    settings: Settings, context: RunContext, record: Mapping[str, Any], videos: Sequence[Path]
) -> None:
    """Record the rollouts beside the runs."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    tags = {"kind": "rollout", "run_dir": str(context.run_dir), "of": record["run"]}
    kept = {name: record[name] for name in ("steps", "execute")}
    tracker.start(f"rollout-{context.run_dir.name}", kept, tags)
    tracker.metrics({f"rollout/{k}": v for k, v in record["metrics"].items()}, record["step"])
    for path in videos:
        tracker.artifact(path, path.parent.name)
    for name in (FILE_NAME, TABLE):
        tracker.artifact(context.run_dir / name)
    tracker.finish("FINISHED")
