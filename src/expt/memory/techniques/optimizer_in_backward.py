"""Optimizer-in-backward: each weight is stepped as soon as its gradient is complete, then freed.

Gradients of the whole model never exist at once: what lives is the largest one (the technique of
LOMO, Lv et al., arXiv:2306.09782, with any optimizer that treats weights one by one). `step` and
`zero_grad` find nothing left to do, so that a training loop needs no change; the mathematics is
that of an ordinary step.

What needs all gradients of a step at once cannot be had with it: accumulation over micro-batches,
clipping by the global norm, and the scaler of fp16. A step that breaks off half way cannot be
taken again either, since some weights have moved: `weights_stepped` says whether any has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

from expt.errors import ConfigError


def stepping(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that steps: the inner one of one that steps in the backward pass."""
    return optimizer.inner if isinstance(optimizer, OptimizerInBackward) else optimizer


class OptimizerInBackward(Optimizer):
    """An optimizer that steps in the backward pass, by hooks on the weights of `inner`.

    `param_groups`, `state` and `state_dict` are those of `inner`: schedules act, and checkpoints
    can be exchanged with runs that step the ordinary way. It has to be kept for as long as it is
    to step: the weights do not keep it alive.

    Raises:
        ConfigError: in the first backward pass, for an optimizer whose groups change in a step.

    """

    def __init__(self, inner: Optimizer) -> None:
        # No super().__init__: groups and state are shared with `inner`, not built again.
        self.inner = inner
        self.weights_stepped = 0
        self.defaults = inner.defaults
        self._share()
        self._group_of = {
            weight: index
            for index, group in enumerate(inner.param_groups)
            for weight in group["params"]
        }
        # Weak, or neither the optimizer nor a weight would ever be freed: Python's collector does
        # not see what a weight's hooks hold.
        step_one = WeakMethod(self._step_one)

        def done(weight: Tensor) -> None:
            if step := step_one():
                step(weight)

        self._hooks = [
            weight.register_post_accumulate_grad_hook(done)
            for weight in self._group_of
            if weight.requires_grad
        ]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do nothing but begin the next step: the backward pass has stepped every weight."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.weights_stepped = 0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what gradients there are: none, unless `remove` was called."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the inner optimizer's state."""
        self.inner.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the hooks are set for the weights there were."""
        raise TypeError("add the group to the inner optimizer, then wrap that again")

    def remove(self) -> Optimizer:
        """Take the hooks off and return the inner optimizer, which steps the ordinary way."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return self.inner

    def _share(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _step_one(self, weight: Tensor) -> None:
        """Let `inner` step this weight alone, with the group's settings of now."""
        groups = self.inner.param_groups
        group = groups[self._group_of[weight]]
        alone = {**group, "params": [weight]}
        self.inner.param_groups = [alone]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
        moved = [
            key for key, value in alone.items() if key != "params" and value is not group.get(key)
        ]
        if moved:
            raise ConfigError(
                f"memory.optimizer_in_backward=true: {type(self.inner).__name__} counts steps in "
                f"its parameter groups ({', '.join(moved)}), which stepping weight by weight "
                "would falsify; set it to false, or choose another optimizer"
            )
        weight.grad = None
        self.weights_stepped += 1
