"""Stepping weights one by one, so that an optimizer's temporaries are those of a single weight.

On CUDA torch's optimizers treat all weights in one go (``foreach``), with temporaries as large as
all of them. One by one takes longer and gives the same weights, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer itself, without the wrapper that Fabric puts around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, Optimizer) else optimizer


class OneByOne:
    """Stands for `optimizer.step`; undone by ``del optimizer.step``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every weight that has a gradient, each alone with its group's settings."""
        optimizer, loss = self.optimizer, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        try:
            for group in groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        optimizer.param_groups = [{**group, "params": [weight]}]
                        type(optimizer).step(optimizer)
        finally:
            optimizer.param_groups = groups
        return loss


def step_one_by_one(optimizer: Optimizer) -> None:
    """Make `optimizer.step` treat weights one by one from now on."""
    bare = bare_optimizer(optimizer)
    bare.step = OneByOne(bare)  # type: ignore[method-assign, assignment]


def steps_at_once(optimizer: Optimizer) -> bool:
    """Tell whether all weights of a group are stepped in one go (``foreach`` or ``fused``)."""
    groups = bare_optimizer(optimizer).param_groups
    return any(group.get("fused") or _by_foreach(group) for group in groups)


def why_not(optimizer: Optimizer) -> str | None:
    """Return why stepping one by one would not help or not be right; None: it would."""
    bare = bare_optimizer(optimizer)
    name = type(bare).__name__
    if isinstance(vars(bare).get("step"), OneByOne):
        return "weights are stepped one by one already"
    if type(bare).__module__.partition(".")[0] != "torch" or isinstance(bare, torch.optim.LBFGS):
        return f"{name} is not known to treat weights independently"
    if not any(_by_foreach(group) for group in bare.param_groups):
        return f"{name} has no temporaries as large as all weights here"
    return None


def _by_foreach(group: dict[str, object]) -> bool:
    """Tell whether ``foreach`` is used: torch's choice on CUDA unless told otherwise."""
    if group.get("fused"):
        return False  # one kernel, without temporaries
    if group.get("foreach") is not None:
        return bool(group["foreach"])
    weights = group["params"]
    return "foreach" in group and isinstance(weights, list) and any(w.is_cuda for w in weights)
