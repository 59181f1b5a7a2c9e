"""A trained model to use: `load` gives it, with what its data were transformed by.

    model, transforms = expt.load("outputs/runs/DATE/TIME-ID")

``best.pt`` holds a recipe beside the weights: the classes of model and data with their resolved
arguments, what the data gave the model's constructor, and the values that were fitted to the
training part (`expt.job.Transformed`). So a model is built again without its training data. A
checkpoint of an earlier version has none; its run's ``config.yaml`` and data stand in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from expt.config.moved import with_current_targets
from expt.config.schema import MemoryConfig, TrackingConfig, TrainerConfig
from expt.config.settings import Settings, parameters_of
from expt.errors import ConfigError
from expt.job import DataSet, Transformed
from expt.memory.techniques.techniques import Techniques, apply
from expt.result import CONFIG_NAME, load_launch
from expt.run.build import MATHEMATICS, build, model_from
from expt.training import checkpoint
from expt.training.batches import Examples

ARRAY = "_array_"
"""Key under which a NumPy array is kept in a recipe, as a tensor."""


def recipe(settings: Settings, data: DataSet, inputs: list[str]) -> dict[str, Any]:
    """Return what a checkpoint needs for its model to be built again, as plain values.

    Args:
        settings: of the run.
        data: what is trained on.
        inputs: the names under which the model gets its inputs.

    """
    asked = parameters_of(settings.target("model"))
    given = {name: v for name, v in data.model_arguments().items() if name in asked}
    kept = {name: plain(value) for name, value in given.items() if is_plain(value)}
    memory = settings.memory
    return {
        "model": plain(dict(settings.arguments["model"])),
        "data": plain(dict(settings.arguments["data"])),
        "model_arguments": kept,
        "from_data": sorted(given.keys() - kept.keys()),
        "inputs": list(inputs),
        "transforms": plain(dict(data.transforms())) if isinstance(data, Transformed) else None,
        "fingerprint": data.fingerprint(),
        "trainable": settings.trainer.trainable,
        "seed": settings.trainer.seed,
        "memory": {name: getattr(memory, name) for name in MATHEMATICS}
        | {"batch_norm": memory.batch_norm.name},
    }


def signature(inputs: Mapping[str, Tensor], output: Tensor) -> dict[str, str]:
    """Return the model's signature as MLflow has them: names, types and shapes [B, ...].

    Args:
        inputs: one sample's, by name, as a batch.
        output: what the model returns for it.

    """

    def spec(value: Tensor, name: str | None = None) -> dict[str, Any]:
        dtype = str(value.dtype).removeprefix("torch.")
        tensor = {"dtype": dtype, "shape": [-1, *value.shape[1:]]}
        named = {} if name is None else {"name": name}
        return {**named, "type": "tensor", "tensor-spec": tensor}

    return {
        "inputs": json.dumps([spec(value, name) for name, value in inputs.items()]),
        "outputs": json.dumps([spec(output)]),
    }


@dataclass
class SavedRun:
    """A run's best weights and what they need.

    Unpacks as ``model, transforms``.
    """

    run_dir: Path
    stored: dict[str, Any]
    """The checkpoint."""
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        """Yield the model and the transforms."""
        yield self.model
        yield self.transforms

    @property
    def step(self) -> int:
        """The optimizer step that the weights are of."""
        return int(self.stored["step"])

    @property
    def validation(self) -> float | None:
        """The monitored figure by which they were the best."""
        return cast("float | None", self.stored["val"])

    @cached_property
    def transforms(self) -> Mapping[str, Any] | None:
        """What the data were transformed by, such as mean and standard deviation; None: nothing."""
        if self.recipe["transforms"] is not None:
            return cast(dict[str, Any], restored(self.recipe["transforms"]))
        if self.recipe["inputs"] is None and isinstance(self._own_data, Transformed):
            return self._own_data.transforms()
        return None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """How to build the model; see `recipe`."""
        return self.stored.get("recipe") or _recipe_of_config(self.run_dir)

    @cached_property
    def settings(self) -> Settings:
        """The model's and the data's arguments, as they were; the rest is the schema's."""
        known = vars(MemoryConfig())
        memory = {k: v for k, v in self.recipe["memory"].items() if k in known}
        arguments = {name: restored(self.recipe[name]) for name in ("model", "data")}
        return Settings(
            TrainerConfig(trainable=self.recipe["trainable"]),
            cast(
                MemoryConfig,
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MemoryConfig), memory)),
            ),
            TrackingConfig(),
            cast("dict[str, dict[str, Any]]", with_current_targets(arguments)),
        )

    @cached_property
    def model(self) -> nn.Module:
        """The model with the best weights, in evaluation mode, on `device`.

        Raises:
            ConfigError: its class is not to be found, or is another one by now.

        """
        given = restored(self.recipe["model_arguments"])
        inputs = self.recipe["inputs"]
        if self.recipe["from_data"] or inputs is None:
            given = {**self._own_data.model_arguments(), **given}
            inputs = inputs or Examples(self._own_data).input_names()
        with torch.random.fork_rng(devices=[]):
            # Frozen weights that are random and not in the checkpoint are those of the run again.
            torch.manual_seed(self.recipe.get("seed", 0))
            model = model_from(self.settings, given, inputs, pretrained=True)
        memory = self.settings.memory
        apply(model, Techniques(**{name: getattr(memory, name) for name in MATHEMATICS}))
        path = self.run_dir / checkpoint.FOLDER / checkpoint.BEST
        try:
            checkpoint.restore_weights(model, dict(self.stored), path)
        except RuntimeError as error:
            raise ConfigError(
                f"{path}: these are not the weights of {type(model).__name__} as it is now "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
        return model.to(self.device).eval()

    def open_data(self, **changes: Any) -> DataSet:
        """Open data for the model, like ``open_data(path="new.npz")``; all of it is to predict.

        What was fitted in training is not fitted again. Data without such values are opened as the
        training's were, with their own splits.

        Raises:
            DataError: it is not there, or does not fit the model.

        """
        return data_for(self.settings, changes, self.transforms)

    @cached_property
    def _own_data(self) -> DataSet:
        return cast(DataSet, build(self.settings, "data"))


def load(run_dir: str | Path, device: str = "cpu") -> SavedRun:
    """Return a run's model with its best weights, and what its data were transformed by.

    Args:
        run_dir: the run's directory, with ``checkpoints/best.pt`` in it.
        device: where to put the model, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: there are no such weights, or they cannot be read.

    """
    run_dir = Path(run_dir).expanduser().absolute()
    path = run_dir / checkpoint.FOLDER / checkpoint.BEST
    if not path.exists():
        raise ConfigError(
            f"{run_dir} has no {checkpoint.FOLDER}/{checkpoint.BEST}: it is no run's directory, or "
            "the run ended before its first validation"
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except checkpoint.UNREADABLE as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error
    # The user's own modules, as the run itself found them; never before what is there already.
    launch = load_launch(run_dir)
    if launch is not None and launch["cwd"] not in sys.path:
        sys.path.append(launch["cwd"])
    return SavedRun(run_dir, stored, torch.device(device))


def data_for(
    settings: Settings, changes: Mapping[str, Any], transforms: Mapping[str, Any] | None
) -> DataSet:
    """Build the data with some arguments changed, and the transforms where they are asked for."""
    arguments = {**settings.arguments, "data": {**settings.arguments["data"], **changes}}
    given = {} if transforms is None else {"transforms": dict(transforms)}
    return cast(DataSet, build(replace(settings, arguments=arguments), "data", **given))


def is_plain(value: Any) -> bool:
    """Tell whether a value can be kept in a checkpoint that is read without running code."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return value is None or isinstance(value, bool | int | float | str | Tensor | np.generic)


def plain(value: Any) -> Any:
    """Return a value as a checkpoint keeps it; `restored` is the way back."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return {ARRAY: torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, np.generic):
        return value.item()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def restored(value: Any) -> Any:
    """Return what `plain` was given, with lists for tuples."""
    if isinstance(value, Mapping):
        if set(value) == {ARRAY}:
            return value[ARRAY].numpy()
        return {name: restored(part) for name, part in value.items()}
    return [restored(part) for part in value] if isinstance(value, list) else value


def _recipe_of_config(run_dir: Path) -> dict[str, Any]:
    """Return the recipe of a run of an earlier version, whose data must still be there."""
    path = run_dir / CONFIG_NAME
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: the checkpoint does not say how its model is built, and there is no "
            f"{CONFIG_NAME} to say it"
        ) from error
    assert isinstance(stored, dict)
    return {
        "model": stored["model"],
        "data": stored["data"],
        "model_arguments": {},
        "from_data": [],
        "inputs": None,
        "transforms": None,
        "fingerprint": None,
        "trainable": stored["trainer"].get("trainable"),
        "memory": {
            name: stored["memory"][name]
            for name in (*MATHEMATICS, "batch_norm")
            if name in stored["memory"]
        },
    }
