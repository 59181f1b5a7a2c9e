"""Which weights of a model are trained: always the same, or others from stage to stage.

A weight that is not trained has no gradient and no optimizer state. A model that is trained in
stages knows which weights any of them trains: the optimizer has all of these from the start (it
passes over a weight without a gradient, and makes its state when it first has one), checkpoints
hold them, and averages are kept of them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from expt.errors import ConfigError, nearest
from expt.memory.techniques.optimizer_in_backward import stepping
from expt.memory.techniques.wrapping import bare, bare_optimizer

EVER = "_ever_trained"
"""Attribute of a model: names of the weights that any stage trains."""


def freeze_others(model: nn.Module, stages: Mapping[str, Sequence[str]]) -> None:
    """Let only weights be trained whose names match a pattern of any stage, like ``expert.*``.

    Args:
        model: not wrapped.
        stages: patterns by the setting that they are from, for messages.

    Raises:
        ConfigError: a pattern matches no weight.

    """
    names = [name for name, _ in model.named_parameters()]
    problems = [
        f"{key}: {pattern!r} matches no weight of {type(model).__name__}; {nearest(pattern, names)}"
        for key, patterns in stages.items()
        for pattern in patterns or [""]
        if not fnmatch.filter(names, pattern)
    ]
    if problems:
        raise ConfigError(problems)
    every = [pattern for patterns in stages.values() for pattern in patterns]
    train_only(model, every)
    if len(stages) > 1:
        vars(model)[EVER] = {n for n, weight in model.named_parameters() if weight.requires_grad}


def train_only(
    model: nn.Module, patterns: Sequence[str], optimizer: Optimizer | None = None
) -> None:
    """Train the weights whose names match, from now on; the others lose gradient and state.

    The state of a weight that stays trained is kept; one that is new has none.
    """
    state = {} if optimizer is None else stepping(bare_optimizer(optimizer)).state
    for name, weight in bare(model).named_parameters():
        trained = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        weight.requires_grad_(trained)
        if not trained:
            weight.grad = None
            state.pop(weight, None)


def ever_trained(model: nn.Module) -> set[str]:
    """Return the names of the weights that are trained now or, by a stage, at another time."""
    inner = bare(model)
    now = {name for name, weight in inner.named_parameters() if weight.requires_grad}
    known: set[str] = vars(inner).get(EVER, set())
    return now | known
