"""Models of transformers from a local folder or a config alone; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import ConfigError


def read_config(source: str | Mapping[str, Any], key: str) -> Any:
    """Return the config of transformers that a folder holds or a mapping spells out.

    Args:
        source: a local folder with its config.json, or the config with ``model_type``.
        key: the setting that `source` is of, for messages.

    Raises:
        ConfigError: it is neither, or none that transformers knows.

    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            f"{key} needs the packages of its extra: pip install 'expt[vla]'"
        ) from error
    try:
        if isinstance(source, Mapping):
            values = dict(source)
            return AutoConfig.for_model(str(values.pop("model_type")), **values)
        return AutoConfig.from_pretrained(Path(source).expanduser(), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{key}: no config that transformers knows: {str(error).splitlines()[0]}"
        ) from error


def from_config(auto: str, config: Any, dtype: torch.dtype | None, key: str) -> Any:
    """Return a model, an `nn.Module`, with random weights.

    Args:
        auto: the class of transformers that finds the model's own, like ``AutoModel``.
        config: as `read_config` returns it.
        dtype: of the weights; None: as the config says.
        key: the setting that the config is of, for messages.

    Raises:
        ConfigError: transformers cannot make it.

    """
    import transformers

    try:
        return getattr(transformers, auto).from_config(config, dtype=dtype or config.dtype)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{key}: transformers cannot make {config.model_type} of its config: {error}"
        ) from error


def load_weights(
    auto: str,
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype | None,
    key: str,
    own_names: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Put a folder's weights into a model.

    Args:
        auto: the class of transformers that finds the model's own.
        model: whose config is the folder's.
        folder: with config.json and weights.
        dtype: in which they are read; None: as the config says.
        key: the setting that names the folder, for messages.
        own_names: from a name in the model to the one in the folder; None: it is not there.

    Raises:
        ConfigError: the folder has no weights, or not all of this model's.

    """
    import transformers
    from safetensors import SafetensorError

    try:
        read = getattr(transformers, auto).from_pretrained(
            folder, local_files_only=True, dtype=dtype or "auto"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{key}={folder}: no weights can be read: "
            f"{' '.join(str(error).split())[:300]}. To train on random weights, give the "
            "config as a mapping instead of a folder"
        ) from error
    put_weights(model, read.state_dict(), f"{key}={folder}", own_names)


def put_weights(
    model: nn.Module,
    stored: Mapping[str, Tensor],
    where: str,
    own_names: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Put weights that were read into a model; those that it does not have are left out.

    Args:
        model: that gets them.
        stored: the weights by their names.
        where: they were read from, for messages.
        own_names: from a name in the model to the one in `stored`; None: it is not there.

    Raises:
        ConfigError: not all of this model's weights are there.

    """
    names = {name: own_names(name) for name in model.state_dict()}
    missing = sorted(name for name in names.values() if name is not None and name not in stored)
    if missing:
        raise ConfigError(f"{where}: {len(missing)} weights are not there, like {missing[0]}")
    model.load_state_dict({n: stored[o] for n, o in names.items() if o is not None}, strict=False)
