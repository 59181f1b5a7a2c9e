"""Weights that are trained from some epoch on: a run in stages (`trainer.trainable`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from expt.config.stages import Stage
from expt.memory.techniques.freezing import train_only
from expt.memory.techniques.wrapping import bare
from expt.units import counted


class Stages:
    """Puts a run's model into the stage of an epoch.

    Args:
        model: with all weights trained that any stage trains.
        optimizer: of all of these.
        stages: in their order; one, or none, changes nothing.

    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, stages: Sequence[Stage]) -> None:
        self._model, self._optimizer = model, optimizer
        self.stages = tuple(stages) if len(stages) > 1 else ()
        self.current: int | None = None

    def enter(self, epoch: int) -> bool:
        """Train what the stage of an epoch (from 0) trains; tell whether it is another one."""
        if not self.stages:
            return False
        number = max(n for n, stage in enumerate(self.stages) if stage.first_epoch <= epoch)
        if number == self.current:
            return False
        self.current = number
        train_only(self._model, self.stages[number].patterns, self._optimizer)
        return True

    def words(self) -> str:
        """Say which stage it is."""
        assert self.current is not None
        stage = self.stages[self.current]
        weights = list(bare(self._model).parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        return (
            f"stage {self.current + 1} of {len(self.stages)}, from epoch {stage.first_epoch} on: "
            f"{counted(trained, 'parameter')} of {sum(weight.numel() for weight in weights):,} "
            f"are trained ({', '.join(stage.patterns)})"
        )
