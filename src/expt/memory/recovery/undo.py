"""What a training step that was broken off has to put back, so that it can be taken again.

Copying weights and optimizer state before every step would cost as much memory as it saves.
Instead every tensor's version counter is noted, which torch raises with every write in place:

- Nothing but gradients was written, the usual case. Random generators, small buffers (batch
  normalisation), and what the optimizer had begun to set up are put back, and the step can be
  taken again.
- A weight or its optimizer state was written: the optimizer's step was broken off half way. Then
  `undo` says so, and only an earlier copy, a checkpoint, helps.

Fused kernels and kernels outside torch write past the version counters. An optimizer that uses
them counts as the second case once it has begun its step (`StepWatch`), except for Adam and AdamW
while their own count of steps, the first thing that they write, is as it was.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from expt.memory.techniques.optimizer_in_backward import stepping
from expt.memory.techniques.wrapping import bare_optimizer


@Optimizer.profile_hook_step
def _step_each_alone(
    optimizer: Optimizer, closure: Callable[[], float] | None = None
) -> float | None:
    """Step every weight that has a gradient, each alone with its group's settings."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # the hooks of a step are called around all weights
    groups = optimizer.param_groups
    try:
        for group in groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    optimizer.param_groups = [{**group, "params": [weight]}]
                    step(optimizer)
    finally:
        optimizer.param_groups = groups
    return loss


class OneByOne:
    """Stands for `optimizer.step`, hooks included; undone by ``del optimizer.step``."""

    _wrapped_by_lr_sched = True
    """To torch's schedulers, which put a function around `step` to see that it was called."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every weight that has a gradient, each alone with its group's settings."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return _step_each_alone(self.optimizer, closure)


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


SMALL_BYTES = 4 * 1024**2
"""Buffers up to this size, together, are copied for every step; larger ones are compared. Running
statistics are always copied, since their kernel writes past the version counters."""
COUNTING = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that raise the count of steps of all weights first (torch/optim/adam.py)."""
NO_STEPS = torch.empty(0)
STEPPING = ("optimizer_step", "step")
"""Phases in which an optimizer that cannot be watched may be at work; ``step`` is one that names
none."""


class RandomState:
    """The generators that a step on `device` may draw from, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python = random.getstate()
        self.numpy = np.random.get_state(legacy=True)
        self.host = torch.get_rng_state()
        self.accelerator: Tensor | None = None
        if device.type == "cuda":
            self.accelerator = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            self.accelerator = torch.mps.get_rng_state()

    def restore(self) -> None:
        """Set them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.accelerator is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.accelerator, self.device)
        elif self.accelerator is not None:
            torch.mps.set_rng_state(self.accelerator)


class StepWatch:
    """Sees an optimizer begin and end its step, by hooks that are taken off when it is freed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.reset()
        self._hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
        if not self._hooked:
            return
        watch = weakref.ref(self)

        def begin(_: Optimizer, args: Any, kwargs: Any) -> None:
            if own := watch():
                own._begin(closure=any(x is not None for x in (*args[1:], *kwargs.values())))

        def end(*_: Any) -> None:
            if own := watch():
                own._under_way = max(own._under_way - 1, 0)

        for handle in (
            optimizer.register_step_pre_hook(begin),
            optimizer.register_step_post_hook(end),
        ):
            weakref.finalize(self, handle.remove).atexit = False

    def reset(self) -> None:
        """Forget what has begun."""
        self.begun, self._under_way = False, 0

    @property
    def sees(self) -> bool:
        """Whether hooks are called; another function that stands for `step` may not call them."""
        step = vars(self._optimizer).get("step")
        return self._hooked and (step is None or hasattr(step, "_wrapped_by_lr_sched"))

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._under_way > 0

    def _begin(self, closure: bool) -> None:
        self.begun = True
        self._under_way += not closure  # a closure is forward and backward passes


class StepUndo:
    """Notes the state before a step, and puts it back after a failed one.

    Args:
        model: its weights and buffers.
        optimizer: with or without Fabric's wrapper.
        device: whose generator is kept.
        scaler: of fp16, whose account of the step is forgotten; None without one.

    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, device: torch.device, scaler: Any = None
    ) -> None:
        self.optimizer = bare_optimizer(optimizer)
        self.watch = StepWatch(stepping(self.optimizer))
        self.device = device
        self.scaler = scaler
        self._model = model
        self._collect()

    def _collect(self) -> None:
        """Find the weights and buffers that there are now."""
        self._grouped = self._in_groups()
        weights = _distinct([*self._model.parameters(), *self._grouped])
        self._small, large = _by_size(list(self._model.buffers()), running_statistics(self._model))
        self._fixed: list[Tensor] = [*weights, *large]
        self._copies = [torch.empty_like(buffer) for buffer in self._small]

    def _in_groups(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def note(self) -> None:
        """Note what is there now; call it before a step."""
        self.watch.reset()
        grouped = self._in_groups()
        if len(grouped) != len(self._grouped) or not all(map(is_, grouped, self._grouped)):
            self._collect()
        self.random = RandomState(self.device)
        self._versions = [tensor._version for tensor in self._fixed]
        self._state = {
            weight: (dict(entries), [value._version for value in _tensors(entries)])
            for weight, entries in self.optimizer.state.items()
        }
        self._groups = [_settings(group) for group in self.optimizer.param_groups]
        with torch.no_grad():
            steps = self._steps()
            # Copied together, on the device: reading them would make the host wait for it.
            self._counts = torch.stack(steps) if steps else None if steps is None else NO_STEPS
            if self._small:
                torch._foreach_copy_(self._copies, self._small)

    def undo(self, phase: str) -> bool:
        """Put back what can be, gradients to None; return whether that was all there was."""
        self.random.restore()
        for weight in (*self._model.parameters(), *self._in_groups()):
            weight.grad = None
        if self.scaler is not None:
            # A gradient is unscaled once per step; torch has no public way to begin one again.
            self.scaler._per_optimizer_states.clear()
        whole = not (self._written() or self._written_unseen(phase))
        state = self.optimizer.state
        for weight in list(state):
            if weight not in self._state:
                del state[weight]
            else:
                state[weight].clear()
                state[weight].update(self._state[weight][0])
        for group, settings in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(settings)
        with torch.no_grad():
            if self._small:
                torch._foreach_copy_(self._small, self._copies)
        self.watch.reset()
        return whole

    def phase(self, told: str) -> str:
        """Return the phase that a step is in, where it did not tell that its optimizer steps."""
        at_once = stepping(self.optimizer) is self.optimizer
        return "optimizer_step" if at_once and self.watch.under_way else told

    def _written(self) -> bool:
        """Tell whether a weight, its state or a large buffer was written since `note`."""
        if [tensor._version for tensor in self._fixed] != self._versions:
            return True
        return any(
            [value._version for value in _tensors(entries)] != versions
            for entries, versions in self._state.values()
        )

    def _written_unseen(self, phase: str) -> bool:
        """Tell whether the optimizer may have written past the version counters."""
        stepped = self._stepped()
        if stepped is not None:
            return stepped
        optimizer = stepping(self.optimizer)
        fused = any(group.get("fused") for group in optimizer.param_groups)
        if type(optimizer).__module__.startswith("torch.optim") and not fused:
            return False
        if self.watch.sees:
            return self.watch.begun
        in_backward = optimizer is not self.optimizer
        return phase in STEPPING or (in_backward and phase == "backward")

    def _steps(self) -> list[Tensor] | None:
        """Return every weight's count of steps; None where that tells no more than versions do."""
        if type(self.optimizer) not in COUNTING or not steps_at_once(self.optimizer):
            return None
        counts = [entries.get("step") for entries in self.optimizer.state.values()]
        found = [count for count in counts if isinstance(count, Tensor)]
        alike = len({count.device for count in found}) <= 1
        return found if alike and len(found) == len(counts) else None

    def _stepped(self) -> bool | None:
        """Tell whether a count of steps is another than it was; waits for the device.

        None: the optimizer does not count, or not so that it would tell.
        """
        counts = self._steps()
        if counts is None or self._counts is None:
            return None
        before = self._counts.tolist()
        # A weight that had no state was never stepped.
        before += [0.0] * (len(counts) - len(before))
        return [float(count) for count in counts] != before


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass of batch normalisation writes."""
    return [
        buffer
        for layer in model.modules()
        if isinstance(layer, _NormBase)
        for buffer in layer.buffers(recurse=False)
    ]


def _by_size(buffers: list[Tensor], always: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Part buffers into those small enough to copy, all together, and the others.

    Those in `always` are copied whatever their size: nobody sees that they are written.
    """
    small, large = list(always), list[Tensor]()
    known = {id(buffer) for buffer in always}
    left = SMALL_BYTES
    for buffer in sorted(buffers, key=lambda tensor: tensor.nbytes):
        if id(buffer) in known:
            continue
        left -= buffer.nbytes
        (small if left >= 0 else large).append(buffer)
    return small, large


def _tensors(entries: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in entries.values() if isinstance(value, Tensor))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
