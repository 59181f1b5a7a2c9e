"""`Settings`: a checked configuration as objects, and `RunContext`: where a run happens."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from expt.config.command_nodes import CardsConfig, FitConfig
from expt.config.moved import hint
from expt.config.schema import AUTO, LoaderConfig, MemoryConfig, TrackingConfig, TrainerConfig
from expt.errors import ConfigError, nearest

OFFLOAD_NEEDS_CUDA = (
    "memory.saved_tensor_offload=true moves what the backward pass needs to host memory, and a "
    "run on {device} has it there already: nothing to gain; set it to false"
)

WEIGHTS_NEED_CUDA = (
    "memory.weight_offload=true keeps frozen weights in host memory, and a run on {device} has "
    "them there already: nothing to gain; set it to false"
)


@dataclass(frozen=True)
class RunContext:
    """Where a run happens: its directory, its parent's, and the keys set on the command line."""

    run_dir: Path
    parent_dir: Path | None = None
    overridden: frozenset[str] = frozenset()
    launch: Mapping[str, Any] = field(default_factory=dict)  # see `result.save_launch`
    fallback_of: Mapping[str, str] = field(default_factory=dict)  # tags; see `run.fallback`


@dataclass(frozen=True)
class Settings:
    """The fixed groups as objects, and the open groups' arguments, all checked."""

    trainer: TrainerConfig
    memory: MemoryConfig
    tracking: TrackingConfig
    arguments: Mapping[str, Mapping[str, Any]]
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    cards: CardsConfig = field(default_factory=CardsConfig)
    callbacks: Sequence[Mapping[str, Any]] = ()
    """A `_target_` each, and its arguments."""

    @property
    def batch_is_auto(self) -> bool:
        """Whether the batch is still to be found; see `expt.run.batch_size`."""
        return bool(self.arguments["data"].get("batch_size") == AUTO)

    def target(self, group: str) -> Callable[..., Any]:
        """Return the class that an open group names."""
        return locate(self.arguments[group]["_target_"])


def locate(target: str) -> Callable[..., Any]:
    """Import ``package.module.Name``; ConfigError says which part is not there."""
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError("expected package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        if not own and (moved := hint(error.name)):
            raise ConfigError(
                f"{module_name} imports {error.name}, which has moved{moved}"
            ) from error
        # A module that exists but itself imports something absent is a fault, not a typo.
        if not own:
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


def parameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return what may be given by name; what a class hands on with ``**`` is its base's."""
    found = dict(inspect.signature(factory).parameters)
    for base in inspect.getmro(factory)[1:-1] if inspect.isclass(factory) else ():
        if not any(one.kind is one.VAR_KEYWORD for one in found.values()):
            break
        if "__init__" in vars(base):
            any_number = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            own = {name: one for name, one in found.items() if one.kind not in any_number}
            found = {**inspect.signature(base).parameters, **own}
    return found


def targets(node: Any) -> set[str]:
    """Collect every `_target_` in a (nested) node."""
    if isinstance(node, Mapping):
        own = {node["_target_"]} if isinstance(node.get("_target_"), str) else set()
        return own.union(*(targets(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(targets(value) for value in node)) if node else set()
    return set()
