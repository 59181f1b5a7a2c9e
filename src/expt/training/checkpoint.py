"""Checkpoints: everything a run needs to go on as if it had never stopped.

``last.pt`` holds model, optimizer, gradient scaler, random states, the position in the data and
the history; ``best.pt`` the weights that validated best, with what is needed to use them
afterwards (`expt.run.saved`). Both are replaced atomically, and ``previous.pt`` is the last one
before, for when the disk has damaged the last. Where most
weights are frozen, these are left out, and only their names and hash are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.errors import ConfigError
from expt.files import replace_atomically
from expt.memory.techniques.freezing import ever_trained
from expt.memory.techniques.wrapping import bare
from expt.result import CHECKPOINTS
from expt.training.average import NoAverage
from expt.training.ranks import OneRank, is_shared_out, whole
from expt.units import counted

FOLDER = CHECKPOINTS
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
FROZEN = "_frozen_weights"
"""Attribute of a model under which the hash of its frozen weights is kept."""
KEPT = "_kept_frozen_weights"
"""Attribute of a model: frozen weights that `keep` named."""
LEFT_OUT = "_left_out"
"""Attribute of a model whose frozen part has left it: what `leave_out` noted."""
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
    streamed samples, and `skipped` are those that could not be read; `tuned` are the changes of
    `expt.training.tuning`; `recovery` is what
    `Recovery.state` of `expt.memory.recovery.recovery` returned, empty in checkpoints from before
    there was one. The schedule goes from step `schedule_start` to `schedule_end`, 0 where it is not
    known. `monitor` is the metric that `best` is of, `data` the fingerprint of what is trained on,
    both empty in checkpoints of earlier versions. `cut` says where in its epoch a run came to
    its end, with the sums up to there: [step_in_epoch, loss, weight]; the epoch was validated, and
    is gone on with from there if the run is.
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
    tuned: list[dict[str, Any]] = field(default_factory=list)
    schedule_start: int = 0
    schedule_end: int = 0
    monitor: str = ""
    data: str = ""
    cut: list[float] | None = None

    def uncut(self) -> Progress:
        """Return where the rest of the epoch is done in which the run came to its end."""
        if self.cut is None:
            return self
        return replace(
            self, epoch=self.epoch - 1, step_in_epoch=int(self.cut[0]), epoch_loss=self.cut[1],
            epoch_weight=self.cut[2], cut=None, history=self.history[:-1],
        )  # fmt: skip


def save_last(
    folder: Path,
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    average: NoAverage,
    progress: Progress,
    ranks: OneRank | None = None,
) -> None:
    """Write ``last.pt``; raises StorageError, with the one before intact.

    Of several processes the first writes, in the format of one.
    """
    state = {
        "model": model,
        "frozen": frozen_weights(model),
        "optimizer": optimizer,
        "average": average.state_dict(),
        "scaler": fabric.strategy.precision.state_dict(),
        "random": random_state(),
        "progress": asdict(progress),
    }
    write = _writer(fabric, model, state, ranks or OneRank())
    if write is None:
        return

    def write_beside(temporary: Path) -> None:
        write(temporary)
        _keep_previous(folder)  # now that there is a newer one

    replace_atomically(folder / LAST, write_beside)


def _writer(
    fabric: Fabric, model: nn.Module, state: dict[str, Any], ranks: OneRank
) -> Callable[[Path], None] | None:
    """Return what writes a checkpoint; None in a process that does not."""
    if ranks.count > 1:
        from expt.training.shared_checkpoint import gather

        whole = gather(state, left_out(model), ranks)
        return (lambda path: torch.save(whole, path)) if ranks.first else None
    return lambda path: fabric.save(path, state, filter=kept(model))


def load_last(
    folder: Path,
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    average: NoAverage,
    ranks: OneRank | None = None,
) -> Progress | None:
    """Restore model, optimizer and random states in place; None if there is nothing to resume.

    Where ``last.pt`` is damaged it is the one before, or else the best weights without the
    optimizer's state; a line says so.

    Raises:
        ConfigError: the checkpoint is of another model, or none can be read.

    """
    if not (folder / LAST).exists():
        return None
    path, stored = _first_readable(folder, fabric)
    try:
        restore_weights(model, stored, path)
        if "optimizer" in stored:
            _restore_optimizer(optimizer, stored["optimizer"])
    except (torch.OutOfMemoryError, MemoryError, ConfigError):
        raise  # recovery's, or said already
    except UNREADABLE as error:
        first_lines = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"trainer.resume: {path} does not fit this configuration ({first_lines}); "
            "resume with the settings of the first run, or choose another hydra.run.dir"
        ) from error
    average.load_state_dict(stored.get("average", {}))
    if "optimizer" in stored:  # of the best weights there is no more than these
        fabric.strategy.precision.load_state_dict(stored["scaler"])
        _restore_random(stored, ranks or OneRank())
    progress = _progress(stored)
    if progress.best is not None and not math.isfinite(progress.best):
        progress.best = None  # how checkpoints of earlier versions said that there is none yet
    return progress


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer's state back, a part of it where the weights are shared out."""
    if any(is_shared_out(one) for group in optimizer.param_groups for one in group["params"]):
        from expt.training.shared_checkpoint import shared_out_state

        state = shared_out_state(optimizer, state)
    optimizer.load_state_dict(state)


def _restore_random(stored: Mapping[str, Any], ranks: OneRank) -> None:
    """Set this process's generators back, if there were as many processes.

    Else all begin anew but the first: what dropout draws is then not what it would have been.
    """
    saved = stored.get("ranks", [stored["random"]])
    if len(saved) == ranks.count:
        restore_random_state(saved[ranks.rank])
        return
    print(
        f"note: the checkpoint was written by {counted(len(saved), 'rank')}, and "
        f"{counted(ranks.count, 'rank')} go on; what is drawn at random (dropout) is not "
        "what it would have been",
        flush=True,
    )
    if ranks.first:
        restore_random_state(stored["random"])


def _first_readable(folder: Path, fabric: Fabric) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint that is not damaged; a line says which are.

    Raises:
        ConfigError: there is none.

    """
    damaged = []
    for name in (LAST, PREVIOUS, BEST):
        path = folder / name
        if not path.exists():
            continue
        try:
            stored = _read(path, fabric)
            step = _progress(stored).step
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except UNREADABLE as error:
            damaged.append(f"{path} is damaged ({' '.join(str(error).split())[:150]})")
            continue
        if damaged:
            lost = "" if name != BEST else ", without the optimizer's state"
            print(f"{'; '.join(damaged)}; going on from {name}, step {step}{lost}", flush=True)
        return path, stored
    raise ConfigError(
        f"trainer.resume: {'; '.join(damaged)}; nothing is left to go on from, so start again in "
        "another folder, hydra.run.dir=FOLDER"
    )


def _progress(stored: Mapping[str, Any]) -> Progress:
    """Return how far a checkpoint is; best weights of earlier versions say little about it."""
    if "progress" in stored:
        return Progress(**stored["progress"])
    step, epoch, value = stored["step"], stored["epoch"], stored["val"]
    return Progress(step=step, epoch=epoch, best=value, best_epoch=epoch)


def _keep_previous(folder: Path) -> None:
    """Give the last checkpoint a second name before it is replaced; nothing is copied."""
    temporary = folder / f".{PREVIOUS}.tmp"
    with contextlib.suppress(OSError):  # a file system without hard links keeps one only
        temporary.unlink(missing_ok=True)
        os.link(folder / LAST, temporary)
        temporary.replace(folder / PREVIOUS)


def read_progress(folder: Path) -> Progress | None:
    """Return how far a run is by its newest checkpoint; None if there is none to be read."""
    for name in (LAST, PREVIOUS, BEST):
        with contextlib.suppress(*UNREADABLE):
            return _progress(torch.load(folder / name, map_location="cpu", weights_only=True))
    return None


def trained_on(folder: Path, progress: Progress) -> str:
    """Return the fingerprint of the data that a run was trained on, empty where it is not known."""
    if not progress.data:
        with contextlib.suppress(*UNREADABLE):
            stored = torch.load(folder / BEST, map_location="cpu", weights_only=True, mmap=True)
            return str(stored.get("recipe", {}).get("fingerprint") or "")
    return progress.data


def save_best(
    folder: Path,
    fabric: Fabric,
    model: nn.Module,
    progress: Progress,
    recipe: Mapping[str, Any] | None = None,
    ranks: OneRank | None = None,
) -> None:
    """Write ``best.pt``: the weights, when they were reached, and how to build their model."""
    state: dict[str, Any] = {
        "model": model,
        "recipe": dict(recipe or {}),
        "frozen": frozen_weights(model),
        "step": progress.step,
        "epoch": progress.epoch,
        "val": progress.best,
        "progress": asdict(progress),
    }
    write = _writer(fabric, model, state, ranks or OneRank())
    if write is not None:
        replace_atomically(folder / BEST, write)


def load_best(folder: Path, fabric: Fabric, model: nn.Module) -> None:
    """Put the best weights into `model`.

    Raises:
        ConfigError: they are of a model with other frozen weights.

    """
    path = folder / BEST
    restore_weights(model, _read(path, fabric), path)


def _read(path: Path, fabric: Fabric) -> dict[str, Any]:
    """Read a checkpoint; of several processes each takes from the file what it needs."""
    if fabric.world_size > 1:
        return cast("dict[str, Any]", torch.load(path, "cpu", weights_only=True, mmap=True))
    return fabric.load(path, weights_only=True)


def left_out(model: nn.Module) -> set[str]:
    """Return the weights that checkpoints leave out: the frozen, where they are most of all."""
    noted = vars(bare(model)).get(LEFT_OUT)
    if noted is not None:
        return set(noted["names"])
    weights = dict(bare(model).named_parameters(remove_duplicate=False))
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    frozen -= vars(bare(model)).get(KEPT, set()) | ever_trained(model)
    if len(frozen) == len(weights):
        return set()  # a model that is not being trained
    sizes = {id(weight): weight.nbytes for weight in weights.values()}  # tied ones count once
    size = sum({id(weights[name]): weights[name].nbytes for name in frozen}.values())
    return frozen if 2 * size > sum(sizes.values()) else set()


def keep(model: nn.Module, names: Iterable[str]) -> None:
    """Let checkpoints hold these weights even where they are frozen: no other file has them.

    Args:
        model: not set up by Fabric yet.
        names: of its state; others are passed over.

    """
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    vars(model)[KEPT] = frozen & set(names)


def stored_names(folder: Path) -> set[str]:
    """Return the names of the weights in a run's newest checkpoint; none if there is none."""
    for name in (LAST, PREVIOUS, BEST):
        with contextlib.suppress(*UNREADABLE):
            return set(torch.load(folder / name, "cpu", weights_only=True, mmap=True)["model"])
    return set()


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
    if LEFT_OUT in vars(inner):
        return {name: vars(inner)[LEFT_OUT][name] for name in ("names", "sha256")}
    known: dict[str, Any] | None = vars(inner).get(FROZEN)
    if known is None or set(known["names"]) != out:
        weights = {name: value for name, value in inner.state_dict().items() if name in out}
        known = {"names": sorted(out), "sha256": _sha256(weights)}
        vars(inner)[FROZEN] = known
    return known


def leave_out(model: nn.Module, names: Iterable[str]) -> str:
    """Let checkpoints leave out parts of a model's state that are about to leave it.

    They are those of the whole model then: it takes them, and they take the place of its own.

    Args:
        model: with all of its parts, not set up by Fabric yet.
        names: of parameters and buffers that do not change.

    Returns:
        the hash of all that is left out.

    """
    before = frozen_weights(model)
    out = left_out(model) | set(names)
    weights = {name: value for name, value in model.state_dict().items() if name in out}
    noted = {"names": sorted(out), "sha256": _sha256(weights), "before": before}
    vars(model)[LEFT_OUT] = noted
    return str(noted["sha256"])


def _is_of_the_same(
    model: nn.Module, found: dict[str, Any] | None, weights: dict[str, Tensor]
) -> bool:
    """Tell whether a checkpoint of another form is of a model: some has its frozen part, some not.

    What is not the model's own is taken out of `weights`.
    """
    inner = bare(model)
    noted = vars(inner).get(LEFT_OUT)
    if noted is None:
        own = inner.state_dict()
        if found is None:  # all of the weights are in the checkpoint
            return own.keys() <= weights.keys()
        left = {name: own[name] for name in found["names"] if name in own}
        return len(left) == len(found["names"]) and _sha256(left) == found["sha256"]
    if found != noted["before"]:
        return False
    stored = {name: weights.pop(name) for name in noted["names"] if name in weights}
    # Beside other frozen weights, what is stored of the part are buffers.
    return found is not None or _sha256(stored) == noted["sha256"]


def restore_weights(model: nn.Module, stored: dict[str, Any], path: Path) -> None:
    """Take the weights out of a checkpoint that was read, and put them into `model`.

    Raises:
        ConfigError: they were written beside other frozen weights.
        RuntimeError: they are of another model.

    """
    expected, found = frozen_weights(model), stored.get("frozen")
    if found != expected and not _is_of_the_same(model, found, stored["model"]):
        raise ConfigError(
            f"{path} was written beside other frozen weights than this model has; it needs the "
            "model, the pretrained weights and the trainer.trainable of the run that wrote it"
        )
    weights = stored.pop("model")
    if any(is_shared_out(weight) for weight in model.parameters()):
        from expt.training.shared_checkpoint import shared_out

        weights = shared_out(weights, bare(model).state_dict())
    missing, unexpected = bare(model).load_state_dict(weights, strict=False)
    lacking = set(missing) - set((found or expected or {"names": ()})["names"])
    if lacking or unexpected:
        raise RuntimeError(f"missing weights {sorted(lacking)}, unexpected {sorted(unexpected)}")


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
    if torch.cuda.is_available():  # there may be fewer cards than there were
        for card, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(own, card)


def weights_sha256(model: nn.Module) -> str:
    """Return a hash over the names and values of every parameter and buffer in a checkpoint."""
    out = left_out(model)
    return _sha256({name: v for name, v in bare(model).state_dict().items() if name not in out})


def _sha256(values: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        complete = whole(value).detach().cpu()
        flat = complete.reshape(-1)  # a scalar buffer has no axis to view as bytes
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(state: Any) -> tuple[Any, ...]:
    """NumPy's state without arrays, so that loading a checkpoint never runs a pickle."""
    name, keys, *rest = state
    return (name, keys.tolist(), *rest)
