"""A search's command line, taken apart and judged: what is varied, what is shared by all trials.

request = request_of(config, ["search=debug", "memory.budget=1GiB"], sampler, hydra_context)
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import key
from expt.config.schema import OnOverflow
from expt.config.search_node import SearchConfig
from expt.errors import ConfigError
from expt.search.space import Space, plain

FIXED = ("model", "data", "optimizer", "trainer", "memory")
"""Groups whose settings all trials of a study share, but for those that are varied."""
MAY_DIFFER = {
    *(f"trainer.{name}" for name in (
        "device", "compile", "checkpoint_every_steps", "log_every_steps", "resume", "test",
        "progress", "profile")),
    *(f"memory.{name}" for name in (
        "budget", "watch", "gpu_threshold", "cpu_threshold", "cleanup_interval_seconds",
        "force_cleanup_every", "plan", "plan_file", "card", "target", "on_overflow", "fallback",
        "fallback_settings")),
}  # fmt: skip
"""Settings that may be others when a study is gone on with: they do not change what is found."""
BATCHES = {"data.batch_size", "data.eval_batch_size"}
"""Settings of data that do not make them others."""
CHANGES_PEAKS = {"trainer.device", "trainer.compile", "memory.card", "memory.target"}
"""Those of them by which peaks, and what is predicted of them, are others all the same."""
ON_OVERFLOW = "memory.on_overflow"
"""Shared by all trials of a study if it is ``adapt``; the others are all the same to a trial."""
SEVERAL = "several"
"""In the place of a setting that workers or restarts of a study gave different values."""


@dataclass(frozen=True)
class Request:
    """A command line, taken apart."""

    config: SearchConfig
    cfg: DictConfig
    given: list[str]
    space: dict[str, str]
    own: str | None
    folder: Path
    sampler: dict[str, Any]


def request_of(
    config: DictConfig, arguments: Sequence[str], sampler: Any, hydra_context: HydraContext
) -> Request:
    """Take the command line apart, and judge it.

    Raises:
        ConfigError: what is not a search, or has values out of range.

    """
    if config.search is None:
        raise ConfigError("no search is chosen for hydra/sweeper=expt; give -m search=NAME")
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    varied = {o.get_key_element(): o for o in parsed if o.is_sweep_override()}
    given = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    cfg = hydra_context.config_loader.load_sweep_config(config, given)
    with open_dict(cfg):
        del cfg["hydra"]
    node = cast(SearchConfig, OmegaConf.to_object(cfg.search))
    # As they are written: what they refer to is a trial's own.
    written = cast(dict[str, Any], OmegaConf.to_container(cfg.search, resolve=False))
    node.retrain_with = list(written["retrain_with"])
    problems = node.problems()
    problems += [
        f"{name}: a search varies the settings of its trials, not itself"
        for name in varied
        if key(name).partition(".")[0] in ("search", "task", "tracking")
    ]
    names = {key(line) for line in given}
    if "trainer.resume" in names:
        problems.append(
            "trainer.resume: a search goes on by itself; start it again with the same search.study"
        )
    if not cfg.task.trains:
        problems.append(f"search=… trains; task._target_={cfg.task._target_} does not")
    if cfg.data.get("batch_size") == "auto":
        problems.append("data.batch_size=auto chooses what the search is to find out; leave it out")
    if problems:
        raise ConfigError(problems)
    # What the command line says wins over the file: a value, or another distribution.
    space = {name: text for name, text in node.space.items() if key(name) not in names}
    for name, override in varied.items():
        space = {known: text for known, text in space.items() if key(known) != key(name)}
        space[name] = str(override.input_line).partition("=")[2]
    own = [s.path for s in config.hydra.runtime.config_sources if s.provider == "command-line"]
    chosen = any(key(line) == "hydra.sweep.dir" for line in config.hydra.overrides.hydra)
    folder = Path(config.hydra.sweep.dir) if chosen else Path("outputs/sweeps") / node.study
    container = OmegaConf.to_container(OmegaConf.create(sampler), resolve=True)
    return Request(
        node, cfg, given, space, own[0] if own else None, folder.absolute(),
        cast(dict[str, Any], container),
    )  # fmt: skip


def fixed_settings(cfg: DictConfig, space: Space) -> dict[str, Any]:
    """Return the settings that all trials share and their figures depend on, as they are written.

    Interpolations stay: a path from the environment may be another one on another machine.
    """
    return _flat(cfg, {key(name) for name in space.distributions} | MAY_DIFFER)


def resolved_settings(cfg: DictConfig, space: Space, device: str) -> dict[str, Any]:
    """Return the settings by which trials of two studies compare, interpolations as their values.

    They are `fixed_settings` and `CHANGES_PEAKS`. An interpolation stays as it is written where it
    depends on what is varied or on the environment, or has no value here.

    Args:
        cfg: the configuration that trials share.
        space: what is varied.
        device: the kind that `trainer.device` stands for here, such as ``cuda``.

    """
    varied = {key(name) for name in space.distributions}
    known = copy.deepcopy(cfg)
    for name in varied:
        with suppress(OmegaConfBaseException):
            OmegaConf.update(known, name, "???")
    found = resolved(_flat(cfg, varied | (MAY_DIFFER - CHANGES_PEAKS)), known)
    return found | ({} if "trainer.device" in varied else {"trainer.device": device})


def resolved(settings: Mapping[str, Any], cfg: DictConfig | None = None) -> dict[str, Any]:
    """Return settings with the values of those that are interpolations, as far as these have any.

    Args:
        settings: by name.
        cfg: what they refer to; None: each other.

    """
    if cfg is None:
        cfg = OmegaConf.create()
        for name, value in settings.items():
            with suppress(OmegaConfBaseException):
                OmegaConf.update(cfg, name, value, force_add=True)
    found = dict(settings)
    for name, value in settings.items():
        if is_interpolation(value) and "${oc.env" not in value:
            # A resolver may raise anything, such as a KeyError for a variable that is not set.
            with suppress(Exception):
                found[name] = plain(OmegaConf.select(cfg, name, throw_on_missing=True))
    return found


def is_interpolation(value: object) -> bool:
    """Tell whether a setting is written as a reference whose value is not known."""
    return isinstance(value, str) and "${" in value


def _flat(cfg: DictConfig, without: Container[str]) -> dict[str, Any]:
    """Return the settings of `FIXED` by their names, as they are written."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if name in without:
            return
        if isinstance(value, Mapping) and value:
            for part in value:
                add(f"{name}.{part}", value[part])
        else:
            found[name] = value

    for group in FIXED:
        add(group, OmegaConf.to_container(cfg[group], resolve=False, enum_to_str=True))
    if cfg.memory.on_overflow is OnOverflow.adapt and cfg.memory.budget is not None:
        found[ON_OVERFLOW] = OnOverflow.adapt.name
    return found


def given_points(node: SearchConfig, space: Space) -> list[dict[str, Any]]:
    """Return the points that were given.

    Raises:
        ConfigError: one is not in the space.

    """
    found = []
    for index, point in enumerate(node.enqueue):
        inside = space.point(point)
        if len(inside) < len(point):
            wrong = [name for name in point if name not in inside]
            raise ConfigError(
                f"search.enqueue[{index}]: not in search.space: "
                f"{', '.join(f'{name}={point[name]}' for name in wrong)}"
            )
        found.append(inside)
    return [point for point in found if point]
