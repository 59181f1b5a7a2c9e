"""`trace_step`: one optimizer step and one evaluation batch under a `StorageTrace`.

The step runs as the target device would run it, on fake tensors, or for real on the CPU where a
model cannot be run on fake ones. Nothing of the caller's is changed, the random state included.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from expt.memory.planning.casting import autocast, backward, target_rules
from expt.memory.planning.fake import build_fake, fake_mode
from expt.memory.planning.peak_plan import Precision, Target
from expt.memory.planning.scratch import cpu_scratch
from expt.memory.planning.trace import StorageTrace
from expt.memory.recovery.undo import RandomState
from expt.memory.techniques.optimizer_in_backward import stepping

Limit = Callable[[], AbstractContextManager[object]]
"""Makes the context that real tensors are made in."""
FAKE_LOG = "torch._subclasses.fake_tensor"
"""Logger that prints a traceback for every operator that refuses its fake arguments."""


@dataclass(frozen=True)
class Step:
    """What is run; see the arguments of `expt.memory.plan`."""

    model_fn: Callable[[], nn.Module]
    batch_fn: Callable[[], Any]
    optimizer_fn: Callable[[list[nn.Parameter]], Optimizer]
    loss_fn: Callable[[Callable[..., Any], Any], Tensor]
    target: Target
    precision: Precision
    micro_batches: int
    clip_norm: float | None
    evaluation_fn: Callable[[Callable[..., Any]], Any] | None
    prepare: Callable[[nn.Module], None]
    resident: tuple[Tensor, ...]
    averaged: bool

    @contextmanager
    def begun(self, real: Limit | None = None) -> Iterator[Begun]:
        """Give model, optimizer and their state, with the target's rules in force inside.

        On fake tensors; on real ones inside what `real` makes, if it is given.
        """
        fake = fake_mode()
        trace = StorageTrace(cpu_scratch if self.target == "cpu" else None)
        with _alone():
            model = self.model_fn() if real else build_fake(self.model_fn, fake)
            self.prepare(model)
            rules = target_rules(self.target, self.precision)
            with rules, real() if real else fake, trace, trace.naming(model):
                yield self._begin(trace, model)

    def _begin(self, trace: StorageTrace, model: nn.Module) -> Begun:
        """Enter what lives throughout: parameters, buffers, averages, optimizer state, data."""
        homes = _homes(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        _enter(trace, [*parameters, *model.buffers()], "parameters", homes)
        trace.enter(self.resident, "inputs")
        averages = {p: torch.empty_like(p) for p in trained if self.averaged}
        for weight, average in averages.items():
            trace.enter([average], "parameters", homes[id(weight)])
        optimizer = self.optimizer_fn(parameters)
        bare = stepping(optimizer)
        bare.register_step_pre_hook(lambda *_: trace.step_begins())
        bare.register_step_post_hook(lambda *_: trace.step_ends())
        _make_state(trace, optimizer, trained, self.target)
        for owner, slots in optimizer.state.items():
            trace.enter(_tensors(slots), "optimizer_state", homes.get(id(owner), ""))
        return Begun(trace, model, optimizer, parameters, trained, homes, averages)


@dataclass
class Begun:
    """A step that is about to be taken, and the trace that it is taken under."""

    trace: StorageTrace
    model: nn.Module
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    trained: list[nn.Parameter]
    homes: Mapping[int, str]  # name of the module that holds a tensor, by the tensor's id
    averages: Mapping[nn.Parameter, Tensor]


def trace_step(step: Step, real: Limit | None = None) -> StorageTrace:
    """Run the step and the evaluation batch, and return the record.

    With `real`, on real tensors of the CPU, which are all gone when this returns.

    Raises:
        torch.OutOfMemoryError: from the limit that `real` makes.

    """
    with step.begun(real) as begun:
        trace, model = begun.trace, begun.model
        forward = _forward(model, step.precision)
        model.train()
        for _ in range(min(step.micro_batches, 2)):  # the second finds the first one's gradients
            with trace.phase("forward"):
                batch = step.batch_fn()
                trace.enter(_tensors(batch), "inputs")
                loss = step.loss_fn(forward, batch)
            _mark(trace, "forward", "activations")
            with trace.phase("backward"):
                backward(loss)
        for parameter in begun.trained:
            if parameter.grad is not None:
                trace.enter([parameter.grad], "gradients", begun.homes[id(parameter)])
        with trace.phase("optimizer_step"):
            if step.clip_norm is not None:
                nn.utils.clip_grad_norm_(begun.parameters, step.clip_norm)
            begun.optimizer.step()
            begun.optimizer.zero_grad()
        del loss, batch
        if step.evaluation_fn is not None:
            model.eval()
            with trace.phase("evaluation"), torch.no_grad():
                step.evaluation_fn(forward)
    return trace


def held_throughout(step: Step) -> dict[str, int]:
    """Return the bytes by category that a step holds whatever its forward pass does.

    Gradients are counted as if every trained parameter had one. Nothing is run but the
    optimizer, on fake tensors, and `step.batch_fn`.
    """
    with step.begun() as begun:
        trace = begun.trace
        for parameter in begun.trained:
            parameter.grad = torch.zeros_like(parameter)
            trace.enter([parameter.grad], "gradients")
        found: dict[str, int] = defaultdict(int)
        for number in trace.alive():
            storage = trace.storages[number]
            if storage.category:
                found[storage.category] += storage.bytes
    with _alone():
        batch = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(step.batch_fn())}
    resident = {tensor.untyped_storage()._cdata for tensor in step.resident}
    found["inputs"] += sum(s.nbytes() for key, s in batch.items() if key not in resident)
    return dict(found)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep a step and the rest of the process apart.

    A ledger that is on would count what is not there; random numbers that a model or a batch
    draws are not missing afterwards.
    """
    state = RandomState(torch.device("cpu"))
    log = logging.getLogger(FAKE_LOG)
    disabled, log.disabled = log.disabled, True
    try:
        with _disable_current_modes(), torch.enable_grad():
            yield
    finally:
        log.disabled = disabled
        state.restore()


def _forward(model: nn.Module, precision: str) -> Callable[..., Any]:
    """Call the model under autocast, its outputs back in fp32, as Fabric does."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast(precision):
            outputs = model(*args, **kwargs)
        return outputs if precision == "fp32" else tree_map(_full_precision, outputs)

    return forward


def _full_precision(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _make_state(
    trace: StorageTrace, optimizer: Optimizer, trained: Iterable[nn.Parameter], target: Target
) -> None:
    """Let the optimizer make its state from zero gradients, so that one step shows the peak."""
    if target == "cuda" and _foreach_by_default(optimizer):
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and group.get("fused") is None:
                group["foreach"] = True
    with trace.phase("optimizer_state"):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        stepping(optimizer).step()
        optimizer.zero_grad()


def _foreach_by_default(optimizer: Optimizer) -> bool:
    """Tell whether torch steps parameters on CUDA all at once unless told otherwise.

    Most optimizers of torch do; Adafactor has the option and leaves it off.
    """
    kinds = type(stepping(optimizer)).mro()
    modules = [sys.modules[kind.__module__] for kind in kinds if kind is not Optimizer]
    return any(hasattr(module, "_default_to_fused_or_foreach") for module in modules)


def _homes(model: nn.Module) -> dict[int, str]:
    """Return which module holds a parameter or buffer; of a shared one, the first."""
    homes: dict[int, str] = {}
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            homes.setdefault(id(tensor), name)
    return homes


def _enter(
    trace: StorageTrace, tensors: Iterable[Tensor], category: str, homes: Mapping[int, str]
) -> None:
    for tensor in tensors:
        trace.enter([tensor], category, homes.get(id(tensor), ""))


def _mark(trace: StorageTrace, phase: str, category: str) -> None:
    """Give what a phase made and left alive a category."""
    for number in trace.alive():
        storage = trace.storages[number]
        if storage.made and storage.phase == phase and not storage.category:
            storage.category = category


def _tensors(tree: Any) -> list[Tensor]:
    if hasattr(tree, "__dataclass_fields__"):
        tree = vars(tree)
    return [value for value in tree_iter(tree) if isinstance(value, Tensor)]
