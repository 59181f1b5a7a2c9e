"""Predictions of trials, made in a process of their own (`expt.run.process.Worker`).

A user's model may crash or hang while it is traced. The process stays for the next trial, and so
does what trials have in common: their composed configuration (`Composer`) and, in the search's
folder, the plans of points that a peak cannot tell apart (`expt.search.plan_cache`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import compose_lines, conf_dir, key, prepare_arguments
from expt.config.explain import first_lines
from expt.config.settings import Settings
from expt.config.validate import validated
from expt.errors import StorageError, UserError
from expt.job import DataSet
from expt.memory.measuring.device_memory import planned_type
from expt.memory.planning.predict import Plan, Target
from expt.run.build import build, build_model
from expt.run.overflow import what_fits
from expt.run.planner import plan_training
from expt.search import plan_cache
from expt.search.plan_cache import UnknownStateError
from expt.search.program import ChangedCodeError
from expt.search.trial import Prediction
from expt.training.batches import Examples


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


def predict(lines: list[str], own: str | None, known: Path | None = None) -> Prediction | str:
    """Return the plan of a trial, a refusal of its settings, or why neither can be had.

    Args:
        lines: the settings of the trial.
        own: the user's own folder of YAML files.
        known: a folder of predictions, to be looked into first, and added to; None: neither.

    """
    try:
        settings, data, target = _composed(lines, own)
        if known is None:
            return _prediction(plan_training(settings, data, target))
        return _recalled(settings, data, target, known)
    except UserError as error:
        return Prediction(refusal=" ".join(str(error).split()))
    except (HydraException, OmegaConfBaseException) as error:
        return Prediction(refusal=first_lines(error))
    except Exception as error:  # whatever a user's model does under fake tensors
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def advise(lines: list[str], own: str | None, budget_bytes: int) -> str | None:
    """Return the changes to a trial that are predicted to fit, None if none are."""
    settings, data, target = _composed(lines, own)
    return what_fits(settings, data, plan_training(settings, data, target), budget_bytes)


def _composed(lines: list[str], own: str | None) -> tuple[Settings, DataSet, Target]:
    cfg = composer.compose(lines, own)
    settings = validated(cfg, {key(line) for line in lines})
    return settings, build(settings, "data"), planned_type(settings.trainer.device.value)


def _recalled(settings: Settings, data: DataSet, target: Target, known: Path) -> Prediction:
    """Return a prediction that was made before, or make it and keep it."""
    examples = Examples(data)
    inputs = examples.input_names()
    try:
        key = plan_cache.key_of(
            settings, data, examples, target, lambda: build_model(settings, data, inputs)
        )
    except Exception:  # whatever a user's model does on the device `meta`; the plan says it, if
        return _prediction(plan_training(settings, data, target, examples=examples))
    found = None
    with suppress(UnknownStateError):  # it is then as if none was kept
        found = plan_cache.find(known, key, settings.trainer)
    if found is None:
        trainer, read = plan_cache.noted(settings.trainer)
        plan = plan_training(replace(settings, trainer=trainer), data, target, examples=examples)
        found = _prediction(plan)
        # What cannot be kept is made again, and that is all.
        with suppress(OSError, StorageError, UnknownStateError, ChangedCodeError):
            plan_cache.keep(known, key, settings.trainer, read, found)
    return found


def _prediction(plan: Plan) -> Prediction:
    low, high = plan.interval_bytes
    beyond = plan.demand_bytes - plan.peak_bytes  # what the allocator reserves besides
    return Prediction(
        peak_bytes=plan.peak_bytes,
        demand_bytes=plan.demand_bytes,
        interval_bytes=(low + beyond, None if high is None else high + beyond),
        plan=plan.as_dict(),
    )
