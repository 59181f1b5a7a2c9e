"""What a search asks of the rest of the program: its trials as command lines, and their plans.

The functions at the end run in processes of their own (`expt.run.process.Worker`), where a
user's model may crash or hang while it is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import compose_lines, conf_dir, groups, key, setting
from expt.config.explain import first_lines
from expt.config.schema import OPEN_GROUPS
from expt.config.search_node import VALIDATION
from expt.config.validate import argument_problems, validated
from expt.errors import ConfigError, UserError, nearest
from expt.job import DataSet, Metric, monitored
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import device_type, planned_type, total_bytes
from expt.run.build import build
from expt.run.process import Worker, WorkerError
from expt.search.metric import EARLIER, metric_of_trials
from expt.search.plan_cache import FOLDER
from expt.search.predicting import Limit, advise, composer, predict
from expt.search.request import BATCHES, Request
from expt.search.space import Space, plain, settings_lines
from expt.search.trial import Prediction
from expt.units import spell_bytes

log = logging.getLogger(__name__)

DECIDED = (
    "trainer.resume", "trainer.test", "memory.plan_file", "tracking.parent", "search.trial",
    "search.storage",
)  # fmt: skip
"""Settings of a trial that are the search's to decide; it has no use for the study's address."""


@dataclass
class TrialJobs:
    """Composes and predicts the trials of one search; implements `expt.search.loop.Jobs`.

    Args:
        given: settings of the command line that hold for every trial.
        own: the user's own folder of YAML files.
        folder: of the search.
        budget_bytes: `memory.budget` in bytes, the same for all trials.
        plan: whether to predict at all.
        seconds: for one prediction.
        worker: predicts; with the threads that trials have.
        varied: settings that trials have from the sampler.
        adapts: whether a trial that is predicted over the budget is given techniques with which it
            is not, other than those that are varied or given.

    """

    given: Sequence[str]
    own: str | None
    folder: Path
    budget_bytes: int | None
    plan: bool = True
    seconds: float = 120.0
    worker: Worker = field(default_factory=Worker)
    varied: Collection[str] = ()
    adapts: bool = False
    _said: bool = False

    def lines(self, number: int, params: Sequence[str]) -> list[str]:
        """Return the settings of a trial, all but those of a single run of it."""
        lines = [line for line in self.given if key(line) not in DECIDED]
        lines += [
            *params,
            f"search.trial={number}",
            *memory_lines(self.budget_bytes),
            setting("tracking.parent", self.folder),
        ]
        return lines

    def predict(self, lines: Sequence[str]) -> Prediction | None:
        """Return what a plan says, None if none can be made."""
        if not self.plan:
            return None
        found = self._predicted(lines, self.folder / FOLDER, self._limit)
        if isinstance(found, str) and self._limit is not None:
            # It took too long, say; what is over the budget as it is must not start all the same.
            found = self._predicted(lines, self.folder / FOLDER, None)
        if isinstance(found, Prediction) and found.recalled and found.exceeds(self.budget_bytes):
            # No point is left out but by a plan of its own.
            chosen = found.techniques
            found = self._predicted([*lines, *settings_lines(chosen)], None, None)
            if isinstance(found, Prediction):
                found = replace(found, techniques=chosen)
        if isinstance(found, str):
            if not self._said:
                self._said = True
                print(f"note: the peak of a trial cannot be predicted ({found}); it is measured")
            return None
        return found

    def _predicted(
        self, lines: Sequence[str], known: Path | None, limit: Limit | None
    ) -> Prediction | str:
        try:
            found = self.worker.call(
                predict, list(lines), self.own, known, limit, seconds=self.seconds
            )
        except WorkerError as error:
            return str(error)
        return cast("Prediction | str", found)

    @property
    def _limit(self) -> Limit | None:
        """What trials are made to fit into, None if they are taken as they are."""
        if not self.adapts or self.budget_bytes is None:
            return None
        own = {key(name).removeprefix("memory.") for name in (*self.varied, *self.given)}
        return Limit(self.budget_bytes, frozenset(own))

    def advise(self, lines: Sequence[str]) -> str | None:
        """Return the changes that would make a trial fit, None if there are none."""
        if self.budget_bytes is None:
            return None
        try:
            found = self.worker.call(
                advise, list(lines), self.own, self.budget_bytes, seconds=self.seconds
            )
        except WorkerError:
            return None
        return cast("str | None", found)


def memory_lines(budget_bytes: int | None) -> list[str]:
    """Return the settings of memory that every trial has, whatever the command line says."""
    # Whether it fits is what the trial finds out.
    lines = ["memory.on_overflow=train", "memory.fallback=none"]
    return lines if budget_bytes is None else [*lines, f"memory.budget={spell_bytes(budget_bytes)}"]


@dataclass(frozen=True)
class Learned:
    """What is known of a search's data before the first trial.

    `fingerprint` is None where it is not known, or trials have different data; `asked` says whether
    a data set told the metric.
    """

    metric: Metric
    fingerprint: str | None = None
    asked: bool = False


def learn_data(request: Request, space: Space, worker: Worker, required: bool = False) -> Learned:
    """Return the metric that the trials of a search will monitor, and their data's fingerprint.

    The data set of the base configuration says so, where the data are varied that of their first
    values. Where no data set can be made here, a trial that was trained before is looked at; else
    it is assumed, and a trial that turns out to monitor another metric is refused.

    Raises:
        ConfigError: `trainer.monitor` names none of the data set's metrics; or a data set is
            required, and cannot be made.

    """
    points = [settings_lines(point) for point in space.covering_points()]
    if request.config.repeats > 1:
        points.append([f"trainer.seed={request.cfg.trainer.seed + 1}"])
    of_data = {name for name in map(key, space.distributions) if name.partition(".")[0] == "data"}
    varied = [line for line in points[0] if key(line) in of_data]
    tries = [request.given, [*request.given, *varied]] if varied else [request.given]
    shared = of_data <= BATCHES
    seconds = request.config.plan_time_limit_seconds
    reason = ""
    try:
        for lines in tries:
            others = [[*lines, *point] for point in points] if shared else None
            found = worker.call(base_data, list(lines), request.own, others, seconds=seconds)
            if found.get("problems"):
                raise ConfigError(found["problems"])
            if "metric" in found:
                return Learned(Metric.from_dict(found["metric"]), found["fingerprint"], asked=True)
            reason = reason or found["reason"]
        if required:
            raise ConfigError(f"there is no data set of these settings: {reason}")
    except WorkerError as error:
        reason = str(error)
    known = metric_of_trials(request.folder)
    if known is None:
        named = request.config.objectives[0].rpartition("/")[2]
        known = EARLIER if named == VALIDATION else Metric(named)
        print(
            f"note: the data set cannot be asked for its metric here ({reason}); val/{known.name} "
            "is taken to be monitored, and lower to be better"
        )
    return Learned(known)


def checker(cfg: DictConfig, own: str | None = None) -> Callable[[str], str | None]:
    """Return a function that judges the name and the type of one ``key=value``.

    Whether a value goes with others is not judged: each trial is, when it comes to it.
    """

    def check(line: str) -> str | None:
        name = key(line)
        group, _, rest = name.partition(".")
        try:
            value = OverridesParser.create().parse_override(line).value()
        except HydraException as error:
            return f"{line}: {first_lines(error)}"
        if not rest:
            return _group_problem(name, value, own)
        if group in OPEN_GROUPS:
            return _argument_problem(cfg, group, rest, value, line)
        if group not in cfg or OmegaConf.select(cfg, group) is None:
            return f"{name}: there is no {group!r}; {nearest(group, [str(k) for k in cfg])}"
        if rest not in cfg[group]:
            known = [f"{group}.{k}" for k in cfg[group]]
            return f"{name}: there is no {rest!r} in {group}; {nearest(name, known)}"
        changed = OmegaConf.masked_copy(cfg, [group])
        try:
            OmegaConf.update(changed, name, value)
        except OmegaConfBaseException as error:
            return f"{line}: {first_lines(error)}"
        return None

    return check


def check_presets(presets: Sequence[str], own: str | None = None) -> None:
    """Refuse a memory preset that is none.

    Raises:
        ConfigError: with the nearest names.

    """
    known = _options("memory", own)
    wrong = [preset for preset in presets if preset not in known]
    if wrong:
        raise ConfigError(
            [f"search.presets: {name!r} is no preset; {nearest(name, known)}" for name in wrong]
        )


def base_facts(given: list[str], own: str | None) -> dict[str, Any]:
    """Return what is wrong with the settings that all trials share, their budget and device.

    ``budget_bytes`` is None without a budget; ``device`` is a kind, like ``cuda``, and
    ``device_bytes`` its memory here, None without a budget.

    This may make a CUDA context.
    """
    try:
        cfg = compose_lines(given, own)
        settings = validated(cfg, {key(line) for line in given})
        value = settings.memory.budget
        device = torch.device(planned_type(settings.trainer.device.value))
        budget = None if value is None else Budget.parse(value, device).bytes
        memory = None if value is None else total_bytes(device)
    except ConfigError as error:
        return {"problems": error.problems}
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return {"problems": [first_lines(error)]}
    kind = device_type(settings.trainer.device.value)
    return {"problems": [], "budget_bytes": budget, "device": kind, "device_bytes": memory}


def base_data(
    given: list[str], own: str | None, points: Sequence[list[str]] | None
) -> dict[str, Any]:
    """Return the metric that these settings monitor, as ``metric``, or why there is none.

    With it comes the ``fingerprint`` of their data, None where those of `points` may be others, or
    where there are no points since the data are varied.
    ``problems`` is what is wrong with `trainer.monitor`; ``reason`` is why there is no data set to
    ask, with these settings or on this machine.
    """
    try:
        settings = validated(compose_lines(given, own), {key(line) for line in given})
        data: DataSet = build(settings, "data")
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return {"reason": first_lines(error)}
    try:
        metric = monitored(data.metrics, settings.trainer.monitor)
    except ConfigError as error:
        return {"problems": error.problems}
    same = _arguments_of_data(given, own) if points is not None else None
    shared = same is not None and all(_arguments_of_data(one, own) == same for one in points or ())
    return {"metric": metric.as_dict(), "fingerprint": data.fingerprint() if shared else None}


def _arguments_of_data(lines: list[str], own: str | None) -> dict[str, Any] | None:
    """Return the arguments that a data set's fingerprint may depend on; None: nobody knows them."""
    try:
        cfg = composer.compose(lines, own)
        found = cast(dict[str, Any], OmegaConf.to_container(cfg.data, resolve=True))
    except Exception:  # a resolver may raise anything
        return None
    return {name: value for name, value in found.items() if f"data.{name}" not in BATCHES}


def preset_values(
    preset: str, names: list[str], given: list[str], own: str | None
) -> dict[str, Any]:
    """Return what a memory preset gives to the settings `names`."""
    lines = [line for line in given if key(line) != "memory"]
    cfg = compose_lines([*lines, f"+memory={preset}"], own)
    values = {}
    for name in names:
        dotted = name.lstrip("+~")
        if OmegaConf.select(cfg, dotted, default=None) is not None:
            values[name] = plain(OmegaConf.select(cfg, dotted))
    return values


def _options(group: str, own: str | None) -> list[str]:
    """Return the names of a group's files, the user's own among them."""
    folders = [conf_dir()] if own is None else [conf_dir(), Path(own)]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _group_problem(name: str, value: Any, own: str | None) -> str | None:
    """Judge the choice of a whole group, like ``optimizer=sgd``."""
    if name not in groups():
        return f"{name}: there is no such setting or group; {nearest(name, groups())}"
    options = _options(name, own)
    if str(value) not in options:
        return f"{name}={value}: no such option; {nearest(str(value), options)}"
    return None


def _argument_problem(cfg: DictConfig, group: str, name: str, value: Any, line: str) -> str | None:
    """Judge one argument of an open group's class."""
    if "." in name:
        return None  # inside of an argument, which the class judges
    node = cast(dict[str, Any], OmegaConf.to_container(cfg[group], resolve=True))
    found = argument_problems(group, {"_target_": node["_target_"], name: plain(value)})
    if not found and name not in node and not line.startswith("+"):
        return f"{group}.{name}: it is not set in the YAML file; write +{group}.{name}"
    return found[0] if found else None
