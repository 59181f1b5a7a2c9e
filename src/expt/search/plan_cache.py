"""Predictions that a search has made already, found by what a plan depends on.

A peak does not depend on every setting: the learning rate, the seed, the rate of a dropout. Which
ones do is not a list of names. A plan is a function of

- the data: the set's arguments, its fingerprint, the sizes of its splits, the shapes of a sample
  and of what stays on the device;
- the memory settings and the loader's, all of them as they are;
- the settings of `trainer` that were read while it was made: `Noted` writes them down. A plan that
  would read the same values again would be the same plan, so that what is never read (the seed, the
  schedule) does not matter;
- the model as it was built: classes, plain attributes, shapes of all weights (`tree`). Of torch's
  own layers of dropout only whether the rate is 0, 1 or between counts. If anything else is in
  there that cannot be written down (a tensor, a hook, an object), the model's arguments as they are
  take the place of the tree;
- the optimizer's arguments. Of torch's own optimizers (`SCALING`) only the sign of ``lr`` and
  ``weight_decay`` counts: they are multiplied with, and compared with nothing but 0;
- what CUDA's allocator may take: the budget, or the card;
- the program: this package, the user's own modules, those that the model's classes come from, the
  versions of all that is installed, the machine, the threads (`expt.search.program`).

What this rests on: that a model's forward follows from its modules and its input. A module that
keeps an argument elsewhere (in a global) would break it, so `expt.search.candidates.TrialJobs`
never leaves a point out by a prediction from here without making the plan itself.

A file for each key in the search's folder, written whole, so that workers share them.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from expt.config.schema import TrainerConfig
from expt.config.settings import Settings
from expt.files import write_json
from expt.job import DataSet
from expt.memory.planning.predict import Target
from expt.run.target import allocator_limit
from expt.search.program import check_code, hash_of_classes, program
from expt.search.trial import Prediction
from expt.training.batches import Examples, kept_on_device

FOLDER = "predictions"
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
SCALING = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
"""Optimizers of torch 2.13 in whose code ``lr`` and ``weight_decay`` are compared with 0 alone."""
SCALED = ("lr", "weight_decay")
OWN_STATE = frozenset(vars(nn.Module()))
"""Attributes of every module; those that may hold something are looked at one by one."""
TRAINER_FIELDS = frozenset(part.name for part in fields(TrainerConfig))


class UnknownStateError(Exception):
    """Something in a model cannot be written down."""


def noted(trainer: TrainerConfig) -> tuple[TrainerConfig, set[str]]:
    """Return settings that write down which of them are read, and the set they write into."""
    read: set[str] = set()

    class Noted(type(trainer)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in TRAINER_FIELDS:
                read.add(name)
            return super().__getattribute__(name)

    found = copy.copy(trainer)
    object.__setattr__(found, "__class__", Noted)
    return found, read


def key_of(
    settings: Settings,
    data: DataSet,
    examples: Examples,
    target: Target,
    model: Callable[[], nn.Module],
) -> str:
    """Return what names all plans of the same data, model, optimizer, memory settings and program.

    Args:
        settings: of the trial.
        data: its data set.
        examples: of that.
        target: the kind of device that is planned for.
        model: builds the model; called on the device ``meta``.

    Raises:
        Exception: what building the model raises, and what `expt.search.program` does.

    """
    arguments = settings.arguments
    with torch.device("meta"):
        built = model()
    try:
        shape: Any = tree(built)
    except UnknownStateError:
        shape = plain(arguments["model"])
    told = {
        "target": target,
        "data": [plain(arguments["data"]), *_told_by(data, examples)],
        "loader": plain(asdict(settings.loader)),
        "memory": plain(asdict(settings.memory)),
        "optimizer": signs(arguments["optimizer"]),
        "model": [str(arguments["model"]["_target_"]), shape],
        "limit": allocator_limit(settings.memory, target),
        "program": [*program(), hash_of_classes({*map(type, built.modules()), type(data)})],
    }
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _told_by(data: DataSet, examples: Examples) -> list[Any]:
    """Return what a plan may see of a data set."""
    sample = examples.batch("train", 1)
    tensors = {**sample.inputs, "target of the loss": sample.target}
    return [
        data.fingerprint(),
        data.size("train"),
        data.size("val"),
        {name: [list(one.shape), str(one.dtype)] for name, one in tensors.items()},
        [[list(one.shape), str(one.dtype)] for one in kept_on_device(data)],
    ]


def tree(model: nn.Module) -> list[Any]:
    """Return a model as plain values: every module's class, attributes and shapes.

    Raises:
        UnknownStateError: there is something that is none of these.

    """
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        kind = type(module)
        from_torch = kind.__module__.startswith("torch.nn.")
        hooks = [one for one in OWN_STATE if "hook" in one and own.get(one)]
        if hooks or (own["_buffers"] and not from_torch):
            raise UnknownStateError(f"{name}: hooks or buffers")
        attributes = {one: value for one, value in own.items() if one not in OWN_STATE}
        if kind in DROPOUTS and isinstance(attributes["p"], int | float):
            attributes["p"] = attributes["p"] if attributes["p"] in (0, 1) else "between"
        weights = {
            one: None if weight is None else [list(weight.shape), str(weight.dtype),
                                              weight.requires_grad, list(weight.stride())]
            for one, weight in (*own["_parameters"].items(), *own["_buffers"].items())
        }  # fmt: skip
        found.append(
            [name, f"{kind.__module__}.{kind.__qualname__}", own["training"], plain(attributes),
             weights, sorted(one for one, child in own["_modules"].items() if child is None)]
        )  # fmt: skip
    # Weights and modules that are one and the same count once.
    found.append(_shared(model))
    return found


def plain(value: Any) -> Any:
    """Return a value as JSON has it, different for different values.

    Raises:
        UnknownStateError: it is of no plain kind.

    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Enum):
        return [type(value).__qualname__, value.name]
    if isinstance(value, int | float):
        return [type(value).__name__, repr(value)]
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return [type(value).__name__, str(value)]
    if isinstance(value, Mapping):
        return [type(value).__name__, [[plain(k), plain(v)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [plain(one) for one in value]]
    if isinstance(value, set | frozenset):
        return ["set", sorted(json.dumps(plain(one)) for one in value)]
    if isinstance(value, type):
        return ["class", f"{value.__module__}.{value.__qualname__}"]
    if isinstance(value, FunctionType) and _found_by_name(value):
        return ["function", f"{value.__module__}.{value.__qualname__}"]
    if inspect.isbuiltin(value):
        return ["builtin", f"{value.__module__}.{value.__qualname__}"]
    if is_dataclass(value) and not isinstance(value, type):
        own = {part.name: getattr(value, part.name) for part in fields(value)}
        if vars(value).keys() <= own.keys():
            return [f"{type(value).__module__}.{type(value).__qualname__}", plain(own)]
    raise UnknownStateError(type(value).__qualname__)


def _found_by_name(function: FunctionType) -> bool:
    """Tell whether a function is its module's, so that its name says all about it."""
    there = getattr(sys.modules.get(function.__module__), function.__name__, None)
    return function.__closure__ is None and there is function


def _shared(model: nn.Module) -> list[list[str]]:
    """Return the names of weights and modules that are one object."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return sorted(own for own in names.values() if len(own) > 1)


def signs(optimizer: Mapping[str, Any]) -> Any:
    """Return an optimizer's arguments; of what it only multiplies with, the sign."""
    target = str(optimizer.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if name not in SCALING or module not in ("torch.optim", f"torch.optim.{name.lower()}"):
        return plain(optimizer)
    return plain(_signed(optimizer))


def _signed(node: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found[name] = _signed(value)
        elif name in SCALED and type(value) in (int, float) and value > 0:
            found[name] = "positive"
        else:
            found[name] = value
    return found


def find(folder: Path, key: str, trainer: TrainerConfig) -> Prediction | None:
    """Return a prediction that was made with this key, where all that it read is as it was.

    Raises:
        UnknownStateError: a setting that it read cannot be written down.

    """
    for stored in _stored(folder / f"{key}.json"):
        if all(plain(getattr(trainer, name)) == was for name, was in stored["read"].items()):
            own = stored["prediction"]
            low, high = own["interval_bytes"]
            return Prediction(**{**own, "interval_bytes": (low, high)}, recalled=True)
    return None


def keep(folder: Path, key: str, trainer: TrainerConfig, read: set[str], made: Prediction) -> None:
    """Keep a prediction; `read` are the settings of the trainer that it depends on.

    Raises:
        UnknownStateError: one of these settings cannot be written down.
        ChangedCodeError: the program's files were changed while it was made.
        OSError, StorageError: it cannot be written.

    """
    check_code()
    path = folder / f"{key}.json"
    kept = [part.name for part in fields(made) if part.name not in ("recalled", "techniques")]
    own = {name: getattr(made, name) for name in kept}
    values = {name: plain(getattr(trainer, name)) for name in sorted(read)}
    others = [stored for stored in _stored(path) if stored["read"] != values]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, [*others, {"read": values, "prediction": own}], durable=False)


def _stored(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return []
