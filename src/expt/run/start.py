"""Beginning a training with the weights of another run: `trainer.start_from`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from expt.errors import ConfigError
from expt.run.saved import load
from expt.training.checkpoint import keep


def start_from(model: nn.Module, run_dir: str | Path) -> str:
    """Give `model` the weights of a run's best step that it has by the same names; say which.

    Those that only `model` has keep what they were made with, such as LoRA's after a stage without.

    Raises:
        ConfigError: there are no such weights, none has a name of the model's, or one of the same
            name has another shape.

    """
    try:
        saved = load(run_dir)
    except ConfigError as error:
        raise ConfigError(f"trainer.start_from: {error}") from error
    own, stored = model.state_dict(), saved.stored["model"]
    shared = [name for name in stored if name in own]
    other = [
        f"trainer.start_from: {name} is {list(stored[name].shape)} there and "
        f"{list(own[name].shape)} here"
        for name in shared
        if stored[name].shape != own[name].shape
    ]
    if other:
        raise ConfigError(other[:5])
    if not shared:
        raise ConfigError(
            f"trainer.start_from={run_dir}: none of its {len(stored)} weights has a name of this "
            "model's"
        )
    keep(model, shared)
    with torch.no_grad():
        for name in shared:
            own[name].copy_(stored[name])
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    new = len([name for name in trained if name not in stored])
    more = f"; {new} are new" if new else ""
    unused = len(stored) - len(shared)
    left = f"; {unused} of its weights have no place here" if unused else ""
    return (
        f"starting from {run_dir}, step {saved.step}: {len(trained) - new} of {len(trained)} "
        f"trained weights{more}{left}"
    )
