"""Configurations that differ from one by some settings, each composed and planned once."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from expt.config.compose import CONFIG_NAME, key
from expt.config.schema import Strategy
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError, ExptError
from expt.job import DataSet
from expt.memory.planning.predict import Plan, Target
from expt.run.allocation import micro_batches
from expt.run.build import build
from expt.run.planner import Planner

log = logging.getLogger(__name__)

OWN = ("task", "allocate", "cards", "tracking", "hydra", "memory.fallback")
"""Settings of a command that plans variants, which are not part of what is planned."""
Changes = tuple[str, ...]
"""Settings of a command line, like ``memory.precision=bf16``, each over those before it."""


class Variant:
    """One configuration."""

    def __init__(self, settings: Settings, data: DataSet, target: Target) -> None:
        self.settings, self.data, self.target = settings, data, target
        self.planner = Planner(settings, data, target)
        whole_only = settings.memory.optimizer_in_backward
        self.share = -(-data.batch_size // settings.trainer.devices)
        """Samples of a step for each process."""
        self.parts = micro_batches(self.share, whole_only)
        """Micro-batches of a share, by size, ascending."""

    @property
    def micro_batch(self) -> int:
        """The configured micro-batch."""
        return -(-self.share // self.settings.memory.gradient_accumulation)

    def plan(self, micro_batch: int | None = None) -> Plan:
        """Return what is predicted, with another micro-batch if it is given.

        Raises:
            ConfigError: the model or a technique refuses its settings.
            Exception: what the user's model raises under fake tensors.

        """
        if micro_batch is None or micro_batch == self.micro_batch:
            return self.planner.plan()
        now = self.planner.now
        return self.planner.plan(replace(now, gradient_accumulation=self.parts[micro_batch]))

    @cached_property
    def model(self) -> nn.Module:
        """The model that is planned, without values."""
        return self._alone.model()

    @cached_property
    def operations(self) -> float | None:
        """Floating-point operations per sample of a training step, None where not countable."""
        try:
            return self._alone.operations()
        except Exception:  # a user's model may do anything under fake tensors
            log.info("the operations of a step could not be counted", exc_info=True)
            return None

    @cached_property
    def _alone(self) -> Planner:
        """The planner of one process, of which weights and arithmetic are the whole model's."""
        trainer = self.settings.trainer
        if trainer.devices == 1:
            return self.planner
        one = replace(trainer, devices=1, strategy=Strategy.auto)
        return Planner(replace(self.settings, trainer=one), self.data, self.target)


class Variants:
    """The variants of a command line.

    Args:
        base: its settings.
        target: the device to plan for.

    """

    def __init__(self, base: Sequence[str], target: Target) -> None:
        self.base, self.target = tuple(base), target
        self._known: dict[Changes, Variant | ConfigError] = {}
        self._data: dict[str, DataSet] = {}

    @classmethod
    def of_launch(cls, context: RunContext, target: Target, own: Sequence[str]) -> Variants:
        """Return the variants of a command's line, without the command's own settings.

        Args:
            context: of the command.
            target: the device to plan for.
            own: names of settings that the command takes for itself, besides those of all.

        """
        left_out = (*OWN, *own)
        given = context.launch.get("overrides", ())
        lines = [
            line
            for line in given
            if not any(f"{key(line)}.".startswith(f"{name}.") for name in left_out)
        ]
        return cls(lines, target)

    def __call__(self, changes: Changes = ()) -> Variant:
        """Return the configuration with `changes`.

        Raises:
            ConfigError: it is none.

        """
        if changes not in self._known:
            try:
                self._known[changes] = self._made(changes)
            except ConfigError as error:
                self._known[changes] = error
        found = self._known[changes]
        if isinstance(found, ConfigError):
            raise found
        return found

    def planned(self, changes: Changes) -> Plan | str:
        """Return what is predicted with `changes`, or why that cannot be had."""
        try:
            return self(changes).plan()
        except ExptError as error:
            return " ".join(str(error).split())
        except Exception as error:  # a user's model may do anything under fake tensors
            log.info("no prediction with %s", changes, exc_info=True)
            return f"{type(error).__name__}: {error}"[:200]

    def _made(self, changes: Changes) -> Variant:
        # The last of several lines for a key holds, which Hydra would refuse.
        lines = {key(line): line for line in (*self.base, *changes)}
        given = list(lines.values())
        try:
            settings = validated(compose(CONFIG_NAME, overrides=given), list(lines))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(" ".join(str(error).split())[:300]) from error
        return Variant(settings, self._read(settings), self.target)

    def _read(self, settings: Settings) -> DataSet:
        named = json.dumps(settings.arguments["data"], sort_keys=True, default=str)
        if named not in self._data:
            found: Any = build(settings, "data")
            self._data[named] = found
        return self._data[named]
