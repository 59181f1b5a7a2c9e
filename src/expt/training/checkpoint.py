"""Checkpoints: everything a run needs to go on as if it had never stopped.

``last.pt`` holds model, optimizer, gradient scaler, random states, the position in the data and
the history; ``best.pt`` the weights that validated best. Both are replaced atomically. Where most
weights are frozen, these are left out, and only their names and hash are kept.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.errors import ConfigError
from expt.files import replace_atomically
from expt.memory.techniques.wrapping import bare
from expt.training.average import NoAverage

FOLDER = "checkpoints"
LAST, BEST = "last.pt", "best.pt"
FROZEN = "_frozen_weights"
"""Attribute of a model under which the hash of its frozen weights is kept."""
UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
"""What torch raises for a checkpoint that is damaged, or of another model."""


@dataclass
class Progress:
    """Where a run is; part of every checkpoint.

    `history` has one row per finished epoch; `epoch_loss` and `epoch_weight` are the sums of the
    epoch under way, so that its mean survives a resume; `data_seconds` were spent waiting for
    streamed samples, and `skipped` are those that could not be read; `recovery` is what
    `Recovery.state` of `expt.memory.recovery.recovery` returned, empty in checkpoints from before
    there was one.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int = 0
    epoch_loss: float = 0.0
    epoch_weight: float = 0.0
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    data_seconds: float = 0.0
    skipped: list[list[Any]] = field(default_factory=list)
    run_id: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    recovery: dict[str, Any] = field(default_factory=dict)


def save_last(
    folder: Path,
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    average: NoAverage,
    progress: Progress,
) -> None:
    """Write ``last.pt``; raises StorageError, with the one before intact."""
    state = {
        "model": model,
        "frozen": frozen_weights(model),
        "optimizer": optimizer,
        "average": average.state_dict(),
        "scaler": fabric.strategy.precision.state_dict(),
        "random": random_state(),
        "progress": asdict(progress),
    }
    replace_atomically(folder / LAST, lambda path: fabric.save(path, state, filter=kept(model)))


def load_last(
    folder: Path, fabric: Fabric, model: nn.Module, optimizer: Optimizer, average: NoAverage
) -> Progress | None:
    """Restore model, optimizer and random states in place; None if there is nothing to resume.

    Raises:
        ConfigError: the checkpoint is of another model or cannot be read.

    """
    path = folder / LAST
    if not path.exists():
        return None
    try:
        rest = _load(path, fabric, model, {"optimizer": optimizer})
    except (torch.OutOfMemoryError, MemoryError, ConfigError):
        raise  # recovery's, or said already; not a damaged file
    except UNREADABLE as error:
        first_lines = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"trainer.resume: {path} does not fit this configuration ({first_lines}); "
            "resume with the settings of the first run, or choose another hydra.run.dir"
        ) from error
    fabric.strategy.precision.load_state_dict(rest["scaler"])
    average.load_state_dict(rest.get("average", {}))
    restore_random_state(rest["random"])
    progress = Progress(**rest["progress"])
    if progress.best is not None and not math.isfinite(progress.best):
        progress.best = None  # how checkpoints of earlier versions said that there is none yet
    return progress


def save_best(folder: Path, fabric: Fabric, model: nn.Module, progress: Progress) -> None:
    """Write ``best.pt``: the weights, and when they were reached."""
    state: dict[str, Any] = {
        "model": model,
        "frozen": frozen_weights(model),
        "step": progress.step,
        "epoch": progress.epoch,
        "val": progress.best,
    }
    replace_atomically(folder / BEST, lambda path: fabric.save(path, state, filter=kept(model)))


def load_best(folder: Path, fabric: Fabric, model: nn.Module) -> None:
    """Put the best weights into `model`.

    Raises:
        ConfigError: they are of a model with other frozen weights.

    """
    _load(folder / BEST, fabric, model, {})


def left_out(model: nn.Module) -> set[str]:
    """Return the weights that checkpoints leave out: the frozen, where they are most of all."""
    weights = dict(bare(model).named_parameters(remove_duplicate=False))
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    if len(frozen) == len(weights):
        return set()  # a model that is not being trained
    sizes = {id(weight): weight.nbytes for weight in weights.values()}  # tied ones count once
    size = sum({id(weights[name]): weights[name].nbytes for name in frozen}.values())
    return frozen if 2 * size > sum(sizes.values()) else set()


def kept(model: nn.Module) -> dict[str, Callable[[str, Any], bool]]:
    """Return which entries of a model's state a checkpoint holds, as `Fabric.save` asks."""
    out = left_out(model)
    return {"model": lambda name, value: name not in out}


def frozen_weights(model: nn.Module) -> dict[str, Any] | None:
    """Return names and hash of the weights that are left out, None if none are.

    The hash is taken once: frozen weights do not change.
    """
    out = left_out(model)
    if not out:
        return None
    inner = bare(model)
    known: dict[str, Any] | None = vars(inner).get(FROZEN)
    if known is None or set(known["names"]) != out:
        weights = {name: value for name, value in inner.state_dict().items() if name in out}
        known = {"names": sorted(out), "sha256": _sha256(weights)}
        vars(inner)[FROZEN] = known
    return known


def _load(path: Path, fabric: Fabric, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Restore the model and `state` in place; return the rest of the checkpoint."""
    stored = fabric.load(path, weights_only=True)
    expected, found = frozen_weights(model), stored.get("frozen")
    if found != expected:
        raise ConfigError(
            f"{path} was written beside other frozen weights than this model has; it needs the "
            "model, the pretrained weights and the trainer.trainable of the run that wrote it"
        )
    missing, unexpected = bare(model).load_state_dict(stored.pop("model"), strict=False)
    lacking = set(missing) - set(expected["names"] if expected else ())
    if lacking or unexpected:
        raise RuntimeError(f"missing weights {sorted(lacking)}, unexpected {sorted(unexpected)}")
    for name, part in state.items():
        part.load_state_dict(stored.pop(name))
    return stored


def random_state() -> dict[str, Any]:
    """Return the states of every generator a training step may draw from."""
    return {
        "python": random.getstate(),
        "numpy": _plain(np.random.get_state(legacy=True)),
        "torch": torch.get_rng_state(),
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators back to what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def weights_sha256(model: nn.Module) -> str:
    """Return a hash over the names and values of every parameter and buffer in a checkpoint."""
    out = left_out(model)
    return _sha256({name: v for name, v in bare(model).state_dict().items() if name not in out})


def _sha256(values: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        flat = value.detach().cpu().reshape(-1)  # a scalar buffer has no axis to view as bytes
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(state: Any) -> tuple[Any, ...]:
    """NumPy's state without arrays, so that loading a checkpoint never runs a pickle."""
    name, keys, *rest = state
    return (name, keys.tolist(), *rest)
