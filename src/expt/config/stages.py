"""Stages of training: which weights are trained from which epoch on (`trainer.trainable`).

One list of patterns holds for the whole run; a mapping has one for each stage, by the epoch that it
begins with, counted from 0: ``{0: [projector.*], 2: [projector.*, language.*]}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY = "trainer.trainable"


@dataclass(frozen=True)
class Stage:
    """Epochs from `first_epoch` to `last_epoch`, from 0, and patterns of the weights trained."""

    first_epoch: int
    last_epoch: int
    patterns: tuple[str, ...]


def stages_of(trainable: Any, epochs: int) -> tuple[Stage, ...]:
    """Return the stages that a run of so many epochs comes to; none where all is always trained."""
    if trainable is None:
        return ()
    if not isinstance(trainable, Mapping):
        return (Stage(0, epochs - 1, tuple(trainable)),)
    every = sorted((int(epoch), tuple(patterns)) for epoch, patterns in trainable.items())
    starts = [start for start in every if start[0] < epochs]
    ends = [epoch - 1 for epoch, _ in starts[1:]] + [epochs - 1]
    return tuple(
        Stage(epoch, end, patterns) for (epoch, patterns), end in zip(starts, ends, strict=True)
    )


def unreached(trainable: Any, epochs: int) -> list[int]:
    """Return the epochs with which stages begin that a run of so many does not come to."""
    if not isinstance(trainable, Mapping):
        return []
    return sorted(int(epoch) for epoch in trainable if int(epoch) >= epochs)


def stage_problems(trainable: Any) -> list[str]:
    """Return what is wrong with `trainer.trainable`, in messages."""
    if trainable is None:
        return []
    if not isinstance(trainable, Mapping):
        return _pattern_problems(KEY, trainable)
    wrong = [epoch for epoch in trainable if not _is_epoch(epoch)]
    if wrong:
        return [
            f"{KEY}: {wrong[0]!r} is no epoch; a mapping has the epoch that each stage begins "
            "with, like {0: [head.*], 2: [head.*, body.*]}"
        ]
    starts = [int(epoch) for epoch in trainable]
    found = []
    if len(set(starts)) < len(starts):
        found.append(f"{KEY}: two stages begin with epoch {max(starts, key=starts.count)}")
    elif starts != sorted(starts):
        found.append(f"{KEY}: the epochs must rise from stage to stage, got {starts}")
    if 0 not in starts:
        found.append(f"{KEY}: the first stage must begin with epoch 0, got {starts}")
    for epoch, patterns in trainable.items():
        found += _pattern_problems(f"{KEY}.{epoch}", patterns)
    return found


def combination_problems(
    stages: int, sharded: bool, weight_offload: bool, feature_cache: str | None
) -> list[str]:
    """Return what several stages cannot be combined with, and why."""
    if stages < 2:
        return []
    key, found = f"{KEY} has {stages} stages", []
    if sharded:
        found.append(
            f"{key}, and trainer.strategy=fsdp gathers weights for a backward pass as they were "
            "frozen or trained at first; use trainer.strategy=ddp, or a run for each stage "
            "(trainer.start_from)"
        )
    if weight_offload:
        found.append(
            f"{key}, and memory.weight_offload=true keeps on the host what is frozen when the run "
            "begins; set it to false, or use a run for each stage (trainer.start_from)"
        )
    if feature_cache == "alternating":
        found.append(
            f"{key}, and memory.feature_cache=alternating decides by itself in which epochs the "
            "lower part is trained; choose one of the two"
        )
    return found


def _pattern_problems(key: str, patterns: Any) -> list[str]:
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        return [f"{key} must be a list of patterns of weights' names, like [head.*]"]
    return []


def _is_epoch(key: Any) -> bool:
    if isinstance(key, bool):
        return False
    return (isinstance(key, int) and key >= 0) or (isinstance(key, str) and key.isdecimal())
