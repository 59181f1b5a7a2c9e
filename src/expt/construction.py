"""From a checked configuration to objects: `build` for an open group, `assemble` for a run.

A component gets the arguments its YAML gives, and, by name, what its constructor asks for and the
data knows. Hydra may build exactly the classes a node names, and nothing else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.utils import instantiate

from expt.errors import ConfigError, ModelError, nearest
from expt.memory.techniques.techniques import Techniques, apply
from expt.memory.techniques.techniques import problems as technique_problems
from expt.protocols import DataSet
from expt.schema import (
    AUTO,
    CardsConfig,
    FitConfig,
    MemoryConfig,
    Preset,
    TrackingConfig,
    TrainerConfig,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn
    from torch.optim import Optimizer

OFFLOAD_NEEDS_CUDA = (
    "memory.saved_tensor_offload=true moves what the backward pass needs to host memory, and a "
    "run on {device} has it there already: nothing to gain; set it to false"
)

AUTO_NOT_HERE = (
    "data.batch_size=auto is found before a training (task=train) or by task=fit_batch; here give "
    "a number, like data.batch_size=16"
)


@dataclass(frozen=True)
class RunContext:
    """Where a run happens: its directory, its parent's, and the keys set on the command line."""

    run_dir: Path
    parent_dir: Path | None = None
    overridden: frozenset[str] = frozenset()
    launch: Mapping[str, Any] = field(default_factory=dict)  # see `results.save_launch`
    fallback_of: Mapping[str, str] = field(default_factory=dict)  # tags; see `tasks.fallback`


@dataclass(frozen=True)
class Settings:
    """The fixed groups as objects, and the open groups' arguments, all checked."""

    trainer: TrainerConfig
    memory: MemoryConfig
    tracking: TrackingConfig
    arguments: Mapping[str, Mapping[str, Any]]
    fit: FitConfig = field(default_factory=FitConfig)
    cards: CardsConfig = field(default_factory=CardsConfig)

    @property
    def batch_is_auto(self) -> bool:
        """Whether the batch is still to be found; see `expt.tasks.auto_batch`."""
        return bool(self.arguments["data"].get("batch_size") == AUTO)

    def target(self, group: str) -> Callable[..., Any]:
        """Return the class that an open group names."""
        return locate(self.arguments[group]["_target_"])


def build(settings: Settings, group: str, **provided: Any) -> Any:
    """Instantiate an open group; of `provided`, it gets what its constructor asks for by name.

    Raises:
        ConfigError: a required argument is neither in the configuration nor provided.

    """
    arguments = settings.arguments[group]
    if group == "data" and settings.batch_is_auto:
        raise ConfigError(AUTO_NOT_HERE)
    parameters = inspect.signature(settings.target(group)).parameters
    handed = {
        name: value
        for name, value in provided.items()
        if name in parameters and name not in arguments
    }
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in arguments
        and name not in handed
    ]
    if missing:
        raise ConfigError(
            [
                f"{group}.{name} is required by {arguments['_target_']} and not set; "
                + (
                    f"the data provides {', '.join(sorted(provided))}"
                    if provided
                    else "give it in the YAML, or let its first line take over the settings of "
                    "another: defaults: [NAME, _self_]"
                )
                for name in missing
            ]
        )
    # Hydra may build exactly the classes this node names, and nothing else.
    factory = instantiate(
        dict(arguments),
        _partial_=True,
        _convert_="all",
        _execution_whitelist_=sorted(targets(arguments)),
    )
    return factory(**handed)


def assemble(settings: Settings, fabric: Fabric, data: DataSet) -> tuple[nn.Module, Optimizer]:
    """Build model and optimizer with the memory techniques asked for, set up on the device.

    Raises:
        ConfigError: an argument is missing, or a technique does not apply to this model.
        ModelError: its forward does not take the data's inputs.

    """
    import torch

    model: nn.Module = build(settings, "model", **data.model_arguments())
    check_forward(model, data.gather("train", torch.arange(1, device=fabric.device)).inputs)
    techniques = techniques_of(settings.memory)
    problems = technique_problems(model, techniques)
    if techniques.saved_tensor_offload and fabric.device.type != "cuda":
        problems.append(OFFLOAD_NEEDS_CUDA.format(device=fabric.device.type))
    if problems:
        raise ConfigError(problems)
    apply(model, techniques)
    optimizer: Optimizer = build(settings, "optimizer", params=list(model.parameters()))
    if techniques.optimizer_in_backward:
        from expt.memory.techniques.optimizer_in_backward import OptimizerInBackward

        optimizer = OptimizerInBackward(optimizer)
    wrapped = fabric.setup(model, optimizer)
    return wrapped[0], wrapped[1]


def check_forward(model: nn.Module, inputs: Iterable[str]) -> None:
    """Check that a model's forward takes what the data hands it by name.

    Raises:
        ModelError: it does not.

    """
    import torch

    if model._forward_pre_hooks or type(model).__call__ is not torch.nn.Module.__call__:
        return  # they may hand it something else
    names = list(inputs)
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # compiled code tells nothing about itself
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ModelError(
            f"{type(model).__name__}.forward{signature} does not take what the data gives it by "
            f"name ({', '.join(names)}): {error}; name the ones it uses, and let **others take "
            "the rest"
        ) from error


def techniques_of(memory: MemoryConfig) -> Techniques:
    """Return the memory techniques that a configuration asks for."""
    return Techniques(**{part.name: getattr(memory, part.name) for part in fields(Techniques)})


def smaller_sizes(memory: MemoryConfig) -> str:
    """Return what to try when a run of these settings does not fit, in words."""
    preset = memory.preset or Preset.lite  # what the sizes are without a preset
    smaller = list(Preset)[list(Preset).index(preset) + 1 :]
    if not smaller:
        return "a smaller model than memory=minimal"
    return f"a smaller preset ({' or '.join(f'memory={one.value}' for one in smaller)})"


def locate(target: str) -> Callable[..., Any]:
    """Import ``package.module.Name``; ConfigError says which part is not there."""
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError("expected package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but itself imports something absent is a fault, not a typo.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"there is no module {error.name!r}; a module of your own must be in the current "
            "folder or on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise ConfigError(f"module {module_name} has no class {name!r}; {nearest(name, public)}")
    return cast(Callable[..., Any], found)


def targets(node: Any) -> set[str]:
    """Collect every `_target_` in a (nested) node."""
    if isinstance(node, Mapping):
        own = {node["_target_"]} if isinstance(node.get("_target_"), str) else set()
        return own.union(*(targets(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(targets(value) for value in node)) if node else set()
    return set()
