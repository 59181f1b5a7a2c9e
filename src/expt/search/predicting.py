"""Predictions of trials, made in a process of their own (`expt.run.process.Worker`).

A user's model may crash or hang while it is traced. The process stays for the next trial, and so
does what trials have in common: their composed configuration (`Composer`) and, in the search's
folder, the plans of points that a peak cannot tell apart (`expt.search.plan_cache`).
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import compose_lines, conf_dir, key, prepare_arguments
from expt.config.explain import first_lines
from expt.config.schema import Precision
from expt.config.settings import Settings
from expt.config.validate import validated
from expt.errors import StorageError, UserError
from expt.job import DataSet
from expt.memory.measuring.device_memory import planned_type
from expt.memory.planning.predict import Plan, Target
from expt.memory.recovery.ladder import changes
from expt.memory.techniques.techniques import Techniques
from expt.run.build import build, build_model
from expt.run.overflow import descend_by_plan, what_fits
from expt.run.planner import Planner, plan_training
from expt.search import plan_cache
from expt.search.plan_cache import UnknownStateError
from expt.search.program import ChangedCodeError
from expt.search.trial import Prediction

log = logging.getLogger(__name__)


class Composer:
    """Composes command lines that end alike: what comes before is composed once, by Hydra.

    The last settings of a line, as long as each only gives a known setting a value, are put in by
    `OmegaConf.update`, as Hydra does it itself. What was composed is of the YAML files as they
    were, and is composed anew once any of them is another.
    """

    MOST = 8
    """Configurations that are kept."""

    def __init__(self) -> None:
        self._bases: OrderedDict[Hashable, DictConfig] = OrderedDict()

    def compose(self, lines: Sequence[str], own: str | None) -> DictConfig:
        """Return what `compose_lines` returns.

        Raises:
            HydraException, OmegaConfBaseException: the settings are refused.

        """
        prepared = prepare_arguments(lines)
        parsed = OverridesParser.create().parse_overrides(prepared)
        end = len(parsed)
        while end and _only_gives_a_value(parsed[end - 1]):
            end -= 1
        place = (own, _files_of(own), tuple(prepared[:end]))
        if place not in self._bases:
            self._bases[place] = compose_lines(prepared[:end], own)
            while len(self._bases) > self.MOST:
                self._bases.popitem(last=False)
        self._bases.move_to_end(place)
        found = copy.deepcopy(self._bases[place])
        try:
            for one in parsed[end:]:
                OmegaConf.update(found, one.key_or_group, one.value(), merge=True)
        except OmegaConfBaseException:
            return compose_lines(lines, own)  # with Hydra's own words
        return found


def _files_of(own: str | None) -> Hashable:
    """Return what tells whether a YAML file, the user's or ours, is another than before."""
    folders = [conf_dir(), *([Path(own)] if own else [])]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.yaml"))]
    states = [(str(path), path.stat()) for path in paths if path.is_file()]
    return tuple((path, state.st_mtime_ns, state.st_size) for path, state in states)


def _only_gives_a_value(override: Override) -> bool:
    """Tell whether an override changes one setting and chooses no file."""
    change = override.type is OverrideType.CHANGE and not override.is_sweep_override()
    name = override.key_or_group
    return change and override.package is None and "." in name and not name.startswith("hydra.")


composer = Composer()


@dataclass(frozen=True)
class Limit:
    """What a trial is to fit into; techniques named in `kept` stay as its settings have them."""

    bytes: int
    kept: frozenset[str]


class KeptPlanner(Planner):
    """Plans of one trial: found in a folder, or made and kept there.

    `recalled` tells whether any plan was found there.

    Args:
        settings: of the trial.
        data: its data set.
        target: the kind of device that is planned for.
        known: the folder; None: there is none.

    """

    def __init__(
        self, settings: Settings, data: DataSet, target: Target, known: Path | None
    ) -> None:
        self._trainer, self._known = settings.trainer, known
        # Plans have parts in common, so that what one of them read, the others depend on too.
        trainer, self._read = plan_cache.noted(settings.trainer)
        super().__init__(replace(settings, trainer=trainer), data, target)
        self.recalled = False

    def plan(
        self, techniques: Techniques | None = None, precision: Precision | None = None
    ) -> Plan:
        """Return what `Planner.plan` returns."""
        own = (*self._with(techniques, precision), self.stage)
        if own in self._plans or self._known is None:
            return super().plan(techniques, precision)
        try:
            name = self._name(*own[:2])
        except Exception:  # whatever a user's model does on the device `meta`; the plan says it, if
            return super().plan(techniques, precision)
        with suppress(UnknownStateError):  # it is then as if none was kept
            found = plan_cache.find(self._known, name, self._trainer)
            if found is not None and found.plan is not None:
                self._plans[own] = Plan.from_dict(found.plan)
                self.recalled = True
        if own not in self._plans:
            made = super().plan(techniques, precision)
            # What cannot be kept is made again, and that is all.
            with suppress(OSError, StorageError, UnknownStateError, ChangedCodeError):
                plan_cache.keep(self._known, name, self._trainer, self._read, _prediction(made))
        return super().plan(techniques, precision)

    def _name(self, techniques: Techniques, precision: Precision) -> str:
        """Return the name of a plan with these in the place of what is configured."""
        memory = replace(self.settings.memory, **vars(techniques), precision=precision)
        settings = replace(self.settings, memory=memory, trainer=self._trainer)
        inputs = self._examples.input_names()
        return plan_cache.key_of(
            settings, self.data, self._examples, self.target,
            lambda: build_model(settings, self.data, inputs),
        )  # fmt: skip


def predict(
    lines: list[str], own: str | None, known: Path | None = None, limit: Limit | None = None
) -> Prediction | str:
    """Return the plan of a trial, a refusal of its settings, or why neither can be had.

    Args:
        lines: the settings of the trial.
        own: the user's own folder of YAML files.
        known: a folder of predictions, to be looked into first, and added to; None: neither.
        limit: what the trial is to fit into, by techniques that its settings do not ask for; where
            none are enough, the prediction is with those that it takes least with. None: it is
            predicted as it is.

    """
    try:
        planner = KeptPlanner(*_composed(lines, own), known)
        techniques = planner.now
        if limit is not None and planner.plan().demand_bytes > limit.bytes:
            techniques = _lighter(planner, limit)
        changed = changes(planner.now, techniques)
        return replace(
            _prediction(planner.plan(techniques)),
            recalled=planner.recalled,
            techniques={f"memory.{name}": value for name, value in changed.items()},
        )
    except UserError as error:
        return Prediction(refusal=" ".join(str(error).split()))
    except (HydraException, OmegaConfBaseException) as error:
        return Prediction(refusal=first_lines(error))
    except Exception as error:  # whatever a user's model does under fake tensors
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _lighter(planner: Planner, limit: Limit) -> Techniques:
    """Return techniques that fit, or those of the lowest demand."""
    try:
        return descend_by_plan(planner, limit.bytes, limit.kept) or planner.lightest
    except Exception:  # whatever a user's model does under fake tensors with a technique on it
        log.info("no technique was found", exc_info=True)
        return planner.lightest


def advise(lines: list[str], own: str | None, budget_bytes: int) -> str | None:
    """Return the changes to a trial that are predicted to fit, None if none are."""
    settings, data, target = _composed(lines, own)
    return what_fits(settings, data, plan_training(settings, data, target), budget_bytes)


def _composed(lines: list[str], own: str | None) -> tuple[Settings, DataSet, Target]:
    cfg = composer.compose(lines, own)
    settings = validated(cfg, {key(line) for line in lines})
    return settings, build(settings, "data"), planned_type(settings.trainer.device.value)


def _prediction(plan: Plan) -> Prediction:
    low, high = plan.interval_bytes
    beyond = plan.demand_bytes - plan.peak_bytes  # what the allocator reserves besides
    return Prediction(
        peak_bytes=plan.peak_bytes,
        demand_bytes=plan.demand_bytes,
        interval_bytes=(low + beyond, None if high is None else high + beyond),
        plan=plan.as_dict(),
    )
