"""`MetaWorldDemonstrations`: demonstrations whose model can act in MetaWorld; see `task=rollout`.

A policy sees what the demonstrations show: the same cameras, the state normalised by the training
part. The noise that its actions are made of is drawn by the trial's seed, so that a rollout is the
same again, whatever else runs at the same time.

Letters: `R` trials that are running, `K` candidates, `H` steps of a chunk, `A` values of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expt.errors import ConfigError, DataError, nearest
from expt.job import Batch, Trial
from expt.jobs.metaworld import (
    ACTION_SIZE,
    OBSERVATION_SIZE,
    Camera,
    Simulation,
    render,
    task_names,
)
from expt.jobs.vla.data import Demonstrations
from expt.jobs.vla.demonstrate import placed, sentence_of

FILM_CAMERA, FILM_SIZE = Camera((0.0, 0.65, 0.15), 1.3, -70.0, -35.0), (240, 240)
FILM_EVERY, FILM_RATE = 4, 20
"""Steps from one frame to the next, and frames a second: as fast as it would be."""


class MetaWorldDemonstrations(Demonstrations):
    """Demonstrations in MetaWorld; arguments are those of `Demonstrations`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        sizes = len(self.state_mean), len(self.action_mean)
        if sizes != (OBSERVATION_SIZE, ACTION_SIZE):
            raise DataError(
                f"data.path={self.shown}: its states and actions have {sizes[0]} and {sizes[1]} "
                f"values; those of MetaWorld have {OBSERVATION_SIZE} and {ACTION_SIZE}"
            )

    @property
    def simulated_tasks(self) -> list[str]:
        """The tasks that there are demonstrations of."""
        return list(dict.fromkeys(self.recordings.episodes[n].task for n in self.numbers))

    def fresh_seeds(self, count: int) -> list[int]:
        """Return seeds that no demonstration was made with, from 0 on."""
        used = {episode.seed for episode in self.recordings.episodes}
        return [seed for seed in range(count + len(used)) if seed not in used][:count]

    def simulator(self, trials: Sequence[Trial], steps: int) -> MetaWorldTrials:
        """Begin trials of at most `steps` steps.

        Raises:
            ConfigError: an unknown task, or the simulator is not installed.

        """
        known = task_names()
        for task in {trial.task for trial in trials}:
            if task not in known:
                raise ConfigError(
                    f"rollout.tasks: MetaWorld has no {task!r}; {nearest(task, known)}"
                )
        return MetaWorldTrials(self, trials, steps)


class MetaWorldTrials:
    """Trials that go on at the same time; implements `expt.job.Simulator`."""

    def __init__(self, data: Demonstrations, trials: Sequence[Trial], steps: int) -> None:
        self._data, self._limit = data, steps
        self._tokens = data.tokens_of([sentence_of(trial.told) for trial in trials])
        self._generators = [_generator(trial) for trial in trials]
        self._taken = [0] * len(trials)
        self._simulations: list[Simulation] = []
        size, cameras = (data.pixels, data.pixels), placed(data.cameras)
        try:
            for trial in trials:
                live = Simulation(trial.task, trial.seed, cameras, size)
                self._simulations.append(live)
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> list[int]:
        """The trials that are neither solved nor at their last step."""
        return [
            number
            for number, live in enumerate(self._simulations)
            if not live.success and self._taken[number] < self._limit
        ]

    @property
    def solved(self) -> list[bool]:
        """Whether each trial was solved, at any step so far."""
        return [live.success for live in self._simulations]

    @property
    def steps(self) -> list[int]:
        """How many steps each trial has taken."""
        return list(self._taken)

    def observe(self) -> Batch:
        """Return what the running trials see [R, ...], and the noise for their next actions."""
        running, data = self.running, self._data
        seen = np.stack([self._simulations[number].observation for number in running])
        inputs = data.blank("test", len(running))
        inputs["state"] = torch.from_numpy(data.normalised(seen))
        shape = inputs["noise"].shape[1:]
        noises = [torch.randn(shape, generator=self._generators[number]) for number in running]
        inputs["noise"] = torch.stack(noises)
        if self._tokens is not None:
            inputs["tokens"] = self._tokens[running]
        if data.cameras:
            drawn = [np.stack(self._simulations[number].draw()) for number in running]
            inputs["images"] = torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3).contiguous()
        return Batch(inputs, torch.full((len(running), *shape[1:]), torch.nan))

    def act(self, predictions: Tensor, steps: int) -> None:
        """Do the first `steps` of the actions [R, H, A], or [R, K, H, A] with the chosen first."""
        chosen = predictions[:, 0] if predictions.dim() == 4 else predictions
        if steps > chosen.shape[1]:
            raise ConfigError(
                f"rollout.execute={steps} is more than the {chosen.shape[1]} actions that the "
                "model predicts at a time (data.chunk)"
            )
        actions = self._data.in_own_units(chosen.numpy())
        for number, chunk in zip(self.running, actions, strict=True):
            live = self._simulations[number]
            for action in chunk[: min(steps, self._limit - self._taken[number])]:
                live.step(action)
                self._taken[number] += 1
                if live.success:
                    break

    def film(self, number: int, path: Path) -> None:
        """Write a trial as mp4.

        Raises:
            ExptError: what draws or encodes is not installed.

        """
        from expt.jobs.clips.decode import av_package
        from expt.jobs.video.render import encode

        av_package()
        live = self._simulations[number]
        at = range(0, len(live.joints), FILM_EVERY)
        encode(path, render(live, FILM_CAMERA, FILM_SIZE, at), FILM_RATE)

    def close(self) -> None:
        """Free the simulators."""
        for live in self._simulations:
            live.close()


def _generator(trial: Trial) -> torch.Generator:
    words = [trial.seed, *f"{trial.task} {trial.told}".encode()]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) & (2**63 - 1))
