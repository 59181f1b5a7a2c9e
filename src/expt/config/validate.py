"""One validation pass before anything heavy: all problems of a configuration in one message.

`validated` looks at everything that can be judged without reading data or building a model. An
open group's keys are compared with the signature of its `_target_`: names, types, and what the
class itself has to say (`expt.job.Checked`).
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.config.command_nodes import CardsConfig, FitConfig
from expt.config.moved import with_current_targets
from expt.config.schema import (
    AUTO,
    OPEN_GROUPS,
    OWN_ARGUMENTS,
    Config,
    LoaderConfig,
    MemoryConfig,
    TrackingConfig,
    TrainerConfig,
)
from expt.config.settings import (
    OFFLOAD_NEEDS_CUDA,
    WEIGHTS_NEED_CUDA,
    Settings,
    locate,
    parameters_of,
    targets,
)
from expt.config.stages import combination_problems
from expt.errors import ConfigError, nearest
from expt.job import Checked, protocol_problem

log = logging.getLogger(__name__)

MOMENTS = ("run_start", "evaluation_end", "epoch_end", "out_of_memory", "run_end")
"""Methods of a callback; see `expt.training.callbacks`."""
PROVIDED = {"optimizer": frozenset({"params"})}
"""Arguments that the framework passes itself; `DataSet.model_arguments` are more, for models."""


def validated(cfg: DictConfig, overridden: Collection[str] = ()) -> Settings:
    """Judge the whole configuration; nothing heavy is imported, read or built.

    Raises:
        ConfigError: with every problem found.

    """
    problems = _added_keys(cfg)
    try:
        trainer = cast(TrainerConfig, OmegaConf.to_object(cfg.trainer))
        memory = cast(MemoryConfig, OmegaConf.to_object(cfg.memory))
        tracking = cast(TrackingConfig, OmegaConf.to_object(cfg.tracking))
        loader = cast(LoaderConfig, OmegaConf.to_object(cfg.loader))
        fit = cast(FitConfig, OmegaConf.to_object(cfg.fit))
        cards = cast(CardsConfig, OmegaConf.to_object(cfg.cards))
        open_groups: dict[str, dict[str, Any]] = {
            group: with_current_targets(
                OmegaConf.to_container(cfg[group], resolve=True, enum_to_str=True)
            )
            for group in OPEN_GROUPS
        }
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if trainer.devices > 1 or "WORLD_SIZE" in os.environ:
        from expt.config.ranks import as_launched, device_problems, rank_problems

        if cfg.task.trains:
            trainer, found = as_launched(trainer)
            problems += found + device_problems(trainer)
        problems += rank_problems(trainer, memory, open_groups, cfg.search is not None)
    problems += memory.problems() + trainer.problems() + tracking.problems()
    problems += loader.problems() + fit.problems() + cards.problems()
    problems += _device_problems(trainer.device.value)
    if not cfg.task.for_any_device:
        problems += _budget_problems(memory, trainer.device.value)
    automatic = open_groups["data"].get("batch_size") == AUTO
    if automatic:
        open_groups["data"]["batch_size"] = memory.gradient_accumulation  # judged like a number
    arguments: dict[str, Mapping[str, Any]] = {}
    for group, node in open_groups.items():
        arguments[group], found = _checked_arguments(group, node, overridden)
        problems += found
    sound = {group: own for group, own in arguments.items() if own}
    problems += _own_problems(sound)
    if "data" in sound:
        problems += _data_set_problems(sound["data"], loader)
    batch_size = arguments["data"].get("batch_size")
    if batch_size is not None and memory.gradient_accumulation > max(batch_size, 1):
        problems.append(
            f"memory.gradient_accumulation={memory.gradient_accumulation} is more parts than "
            f"there are samples in a batch, data.batch_size={batch_size}"
        )
    problems += _technique_problems(memory, trainer, arguments["data"])
    if not trainer.problems():
        problems += combination_problems(
            len(trainer.stages), trainer.sharded, memory.weight_offload, memory.cached_features
        )
    problems += _feature_cache_problems(memory, trainer, sound)
    if automatic and "batch_size" in arguments["data"]:
        arguments["data"] = {**arguments["data"], "batch_size": AUTO}
    if "optimizer" in sound:
        problems += _optimizer_problems(sound["optimizer"])
    callbacks, found = _checked_callbacks(cfg, overridden)
    problems += found
    if problems:
        raise ConfigError(problems)
    return Settings(trainer, memory, tracking, arguments, loader, fit, cards, callbacks)


def _checked_callbacks(
    cfg: DictConfig, overridden: Collection[str]
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the sound nodes of `callbacks`, and what is wrong with the others."""
    nodes = OmegaConf.to_container(cfg.callbacks, resolve=True)
    assert isinstance(nodes, list)
    kept: list[Mapping[str, Any]] = []
    problems = []
    for number, node in enumerate(nodes):
        key = f"callbacks.{number}"
        if not isinstance(node, dict):
            problems.append(f"{key} must be a class like {{_target_: my_lab.Hook}}, got {node!r}")
            continue
        arguments, found = _checked_arguments(key, node, overridden)
        problems += found
        if arguments and not any(hasattr(locate(arguments["_target_"]), m) for m in MOMENTS):
            problems.append(
                f"{key}: {arguments['_target_']} has none of the methods that are called: "
                f"{', '.join(MOMENTS)} (expt.training.callbacks.Callback)"
            )
        kept.append(arguments)
    return kept, problems


def _added_keys(cfg: DictConfig) -> list[str]:
    """Refuse keys that ``+key=value`` put where the schema has none; Hydra lets them pass."""
    nodes: dict[str, tuple[DictConfig, Any]] = {"": (cfg, Config)}
    for group in (part.name for part in fields(Config)):
        if group not in (*OPEN_GROUPS, "callbacks") and cfg[group] is not None:
            nodes[f"{group}."] = (cfg[group], OmegaConf.get_type(cfg[group]))
    problems = []
    for prefix, (node, schema) in nodes.items():
        known = {part.name for part in fields(schema)}
        added = [str(key) for key in node if key not in known]
        problems += [f"{prefix}{k}: there is no such key; {nearest(k, known)}" for k in added]
    return problems


def _checked_arguments(
    group: str, node: dict[str, Any], overridden: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the sound arguments (none without a class to pass them to), and what is wrong."""
    target = node.get("_target_")
    if not isinstance(target, str):
        return {}, [f"{group}._target_ must name a class, like my_lab.MyNet, got {target!r}"]
    try:
        factory = locate(target)
        parameters = parameters_of(factory)
    except ConfigError as error:
        return {}, [f"{group}._target_={target}: {error}"]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kept, problems, dropped = {"_target_": target}, [], []
    hints = _type_hints(factory)
    for name, value in node.items():
        key = f"{group}.{name}"
        if name == "_target_":
            continue
        if name in OWN_ARGUMENTS.get(group, ()):
            kept[name] = value
            continue
        if name not in parameters and not takes_any:
            if f"{group}._target_" in overridden and key not in overridden:
                dropped.append(name)
            else:
                problems.append(
                    f"{key}: {target} has no such argument; "
                    f"{nearest(name, set(parameters) - PROVIDED.get(group, set()))}"
                )
            continue
        if value == "???":
            problems.append(f"{key} must be given, like {key}=VALUE")
        elif name in hints and not _conforms(value, hints[name]):
            expected = inspect.formatannotation(hints[name])
            expected += f" or the word {AUTO}" if key == "data.batch_size" else ""
            problems.append(f"{key}={value!r}: expected {expected}, got {type(value).__name__}")
        else:
            kept[name] = value
    if dropped:
        log.info(
            "%s._target_ is set on the command line: not passing on %s, which %s does not take",
            group,
            ", ".join(dropped),
            target,
        )
    return kept, problems


def argument_problems(group: str, node: dict[str, Any]) -> list[str]:
    """Judge the names and types of some of the arguments of an open group's class."""
    return _checked_arguments(group, node, ())[1]


def _own_problems(arguments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ask the classes themselves; a model is also told the data's arguments it asks for."""
    found: list[str] = []
    for group, own in arguments.items():
        factory = locate(own["_target_"])
        if not isinstance(factory, Checked):
            continue
        shared = {}
        if group == "model":
            asked = inspect.signature(cast(Callable[..., Any], factory)).parameters
            shared = {
                name: value for name, value in arguments.get("data", {}).items() if name in asked
            }
        found += factory.problems({**shared, **own})
    return found


def _data_set_problems(arguments: Mapping[str, Any], loader: LoaderConfig) -> list[str]:
    """Refuse a class that is no data set, and loader settings that its kind of data cannot have."""
    cls = locate(arguments["_target_"])
    if not inspect.isclass(cls):
        return []  # a function that makes one; what it returns is not known yet
    problem = protocol_problem(cls)
    if problem is not None:
        return [problem]
    if hasattr(cls, "gather") and loader.pin_memory:
        return [
            f"loader.pin_memory=true: the samples of {cls.__name__} are on the device already, and "
            "torch cannot pin what is not in host memory; leave it out"
        ]
    return []


def _technique_problems(
    memory: MemoryConfig, trainer: TrainerConfig, data: Mapping[str, Any]
) -> list[str]:
    """Refuse memory techniques that contradict settings of another group."""
    found = []
    if memory.optimizer_in_backward and trainer.gradient_clip_norm is not None:
        found.append(
            "memory.optimizer_in_backward=true steps each weight before the norm of all gradients "
            f"is known, which trainer.gradient_clip_norm={trainer.gradient_clip_norm} needs; set "
            "trainer.gradient_clip_norm=null or memory.optimizer_in_backward=false"
        )
    if memory.saved_tensor_offload and trainer.device.value in ("cpu", "mps"):
        found.append(OFFLOAD_NEEDS_CUDA.format(device=trainer.device.value))
    if memory.weight_offload and trainer.device.value in ("cpu", "mps"):
        found.append(WEIGHTS_NEED_CUDA.format(device=trainer.device.value))
    chunked = data.get("eval_batch_size")
    if chunked is not None and memory.forward_chunks > max(chunked, 1):
        found.append(
            f"memory.forward_chunks={memory.forward_chunks} is more slices than there are samples "
            f"in a batch of evaluation, data.eval_batch_size={chunked}"
        )
    return found


def _feature_cache_problems(
    memory: MemoryConfig, trainer: TrainerConfig, arguments: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Refuse a feature cache that the model or the loop cannot have."""
    mode = memory.cached_features
    if mode is None or memory.problems():
        return []
    found, key = [], f"memory.feature_cache={mode}"
    if "model" in arguments:
        cls = locate(arguments["model"]["_target_"])
        if inspect.isclass(cls) and not hasattr(cls, "features"):
            found.append(
                f"{key}: {cls.__name__} does not say what its frozen part makes of a sample "
                "(expt.job.FeatureCached; docs/feature-cache.md); set memory.feature_cache=off"
            )
    if mode == "alternating" and trainer.steps_per_epoch is not None:
        found.append(
            f"{key} writes the features of all samples in a live epoch, and "
            f"trainer.steps_per_epoch={trainer.steps_per_epoch} may leave some out; set it to null"
        )
    if mode == "alternating" and trainer.repeat_first_epoch:
        found.append(f"{key}: with trainer.repeat_first_epoch=true every epoch is a live one")
    return found


def _optimizer_problems(arguments: Mapping[str, Any]) -> list[str]:
    """Let the optimizer's own constructor judge its settings, on a single weight."""
    import torch

    own = {name: value for name, value in arguments.items() if name != "_target_"}
    groups = own.pop("groups", None)
    if groups is not None and not (
        isinstance(groups, dict) and all(isinstance(value, dict) for value in groups.values())
    ):
        return ["optimizer.groups must map groups to settings, like {backbone.*: {lr: 1e-5}}"]
    if targets(own) or not isinstance(locate(arguments["_target_"]), type):
        return []
    try:
        locate(arguments["_target_"])(params=[torch.nn.Parameter(torch.zeros(1))], **own)
    except (ValueError, TypeError, RuntimeError) as error:  # torch's raise any of them
        return [f"optimizer: {error}"]
    return []


def _device_problems(name: str) -> list[str]:
    """Refuse a device that is not there; torch is imported only to ask about one."""
    if name in ("auto", "cpu"):
        return []
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if available[name]:
        return []
    return [f"trainer.device={name}: no such device here; try trainer.device=auto"]


def _budget_problems(memory: MemoryConfig, name: str) -> list[str]:
    """Refuse a budget larger than the device; torch is imported only where there is a budget."""
    if memory.budget is None or memory.problems():
        return []
    import torch

    from expt.memory.measuring.budget import Budget
    from expt.memory.measuring.device_memory import planned_type

    name = planned_type(name)
    if name == "cuda" and not torch.cuda.is_available():
        return []
    try:
        Budget.parse(memory.budget, torch.device(name))
    except ConfigError as error:
        return error.problems
    return []


def _type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the constructor's annotations; none where they cannot be evaluated."""
    try:
        if not inspect.isclass(factory):
            return typing.get_type_hints(factory)
        # What a class hands on to its base has the base's types.
        classes = [one for one in reversed(inspect.getmro(factory)) if "__init__" in vars(one)]
        hints = [typing.get_type_hints(vars(one)["__init__"]) for one in classes[1:]]
        known = parameters_of(factory)
        return {name: hint for own in hints for name, hint in own.items() if name in known}
    except (NameError, TypeError, AttributeError):
        return {}


def _conforms(value: Any, hint: Any) -> bool:
    """Tell whether a value from YAML fits an annotation, without conversion of words to numbers."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        try:
            adapter = TypeAdapter(hint)
        except PydanticUserError:
            return True  # an annotation that says nothing about plain values
    try:
        # JSON's strict rules are YAML's: a list fits a tuple, an int a float, "5" no int.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    except TypeError:
        return True
    return True
