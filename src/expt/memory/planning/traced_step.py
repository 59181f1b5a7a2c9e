"""`trace_step`: training steps and an evaluation batch under a `StorageTrace`.

Steps run as the target device would run them, on fake tensors, or for real on the CPU where a
model cannot be run on fake ones. There are two at least: the optimizer makes its state in the
first and finds it in the second. Where steps differ, some more are taken. Nothing of the caller's
is changed, the random state included.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from expt.errors import UserError
from expt.memory.measuring.ledger import SHARDING
from expt.memory.planning.autocast import autocast, target_rules
from expt.memory.planning.cpu_scratch import cpu_scratch, operand_copies
from expt.memory.planning.differences import Differences, holders
from expt.memory.planning.fake import build_fake, build_real
from expt.memory.planning.function_rules import backward
from expt.memory.planning.hybrid import HybridFakeMode
from expt.memory.planning.plan import Precision, Target
from expt.memory.planning.trace import StorageTrace
from expt.memory.recovery.undo import RandomState
from expt.memory.techniques.batch_norm import running_statistics
from expt.memory.techniques.freezing import ever_trained
from expt.memory.techniques.optimizer_in_backward import stepping

if TYPE_CHECKING:
    from expt.memory.planning.shared import Shared

Limit = Callable[[], AbstractContextManager[object]]
"""Makes the context that real tensors are made in."""
StepFn = Callable[[nn.Module, Any, Any], object]
FAKE_LOG = "torch._subclasses.fake_tensor"
"""Logger that prints a traceback for every operator that refuses its fake arguments."""
FEWEST_STEPS = 2
MOST_STEPS = 12
"""Steps where they differ."""
MOST_SECONDS = 10.0
"""No further step is begun after this."""
PATIENCE = 8
"""Batches after which a `step_fn` that accumulates must have stepped."""


@dataclass(frozen=True)
class Step:
    """What is run; see the arguments of `expt.memory.plan`."""

    model_fn: Callable[[], nn.Module]
    batch_fn: Callable[[], Any]
    optimizer_fn: Callable[[list[nn.Parameter]], Any]
    loss_fn: Callable[[Callable[..., Any], Any], Tensor] | None
    target: Target
    precision: Precision
    micro_batches: int
    clip_norm: float | None
    evaluation_fn: Callable[[Callable[..., Any]], Any] | None
    prepare: Callable[[nn.Module], None]
    resident: tuple[Tensor, ...]
    averaged: bool
    step_fn: StepFn | None = None
    last_backward: Callable[[], AbstractContextManager[object]] = nullcontext
    shared: Shared | None = None
    keys: tuple[Hashable, Hashable] = ((), ())  # what steps and evaluation depend on, of `shared`

    @contextmanager
    def prepared(
        self, real: Limit | None = None, fake: HybridFakeMode | None = None
    ) -> Iterator[PreparedStep]:
        """Give model and optimizer, with the target's rules in force inside.

        On fake tensors, under `fake` if it is given; on real ones inside what `real` makes.
        """
        fake = fake or HybridFakeMode()
        trace = self._trace()
        with _alone():
            if real:
                model = build_real(self.model_fn, self._warm)
            else:
                model = build_fake(self.model_fn, fake, self._warm)
            self.prepare(model)
            try:
                with (
                    # Code that asks torch to compile it runs as it is, and our modes are no code
                    # that should be compiled.
                    torch.compiler.set_stance("force_eager"),
                    target_rules(self.target),
                    _resizes_told(trace),
                    real() if real else fake,
                    trace,
                    trace.naming(model),
                ):
                    yield self._prepare(trace, model, fake)
            finally:
                fake.forget()

    def _trace(self) -> StorageTrace:
        if self.target == "cpu":
            return StorageTrace(cpu_scratch, runs_kernels=True)
        # Where it is needed: a training on the CPU imports nothing of it.
        from expt.memory.planning.cuda_kernels import attention_results

        return StorageTrace(operand_copies, result_of=attention_results)

    def _prepare(self, trace: StorageTrace, model: nn.Module, fake: HybridFakeMode) -> PreparedStep:
        """Enter what lives throughout: parameters, buffers, averages, data."""
        homes = _homes(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        trace.enter(self.resident, "inputs")
        ever = ever_trained(model) if self.averaged else ()
        averaged = [weight for name, weight in model.named_parameters() if name in ever]
        tracked = [*averaged, *running_statistics(model).values()] if self.averaged else []
        averages = {value: torch.empty_like(value) for value in tracked}
        for value, average in averages.items():
            trace.enter([average], "parameters", homes.get(id(value), ""))
        optimizer = self.optimizer_fn(parameters)
        prepared = PreparedStep(
            self, trace, model, fake, optimizer, _optimizers(optimizer, parameters), parameters,
            trained, homes, averages, Differences(trace, fake),
        )  # fmt: skip
        prepared.watch_optimizers()
        prepared.enter_held()
        return prepared

    def _warm(self, model: nn.Module) -> None:
        """Run a model once, so that lazy modules get their weights."""
        with torch.no_grad():
            batch = self.batch_fn()
            if self.loss_fn is not None:
                self.loss_fn(model, batch)
            else:
                model(batch)

    def batch(self) -> Any:
        """Return a batch.

        Raises:
            UserError: `batch_fn` gives nothing, or a generator.

        """
        batch = self.batch_fn()
        if batch is None or isinstance(batch, GeneratorType):
            found = "None" if batch is None else "a generator: wrap it, as in lambda: next(batches)"
            raise UserError(f"batch_fn must return one batch, got {found}")
        return batch


@dataclass
class PreparedStep:
    """A step that is about to be taken, and the trace that it is taken under."""

    step: Step
    trace: StorageTrace
    model: nn.Module
    fake: HybridFakeMode
    optimizer: Any  # what `optimizer_fn` made: an optimizer, or several
    optimizers: list[Optimizer]
    parameters: list[nn.Parameter]
    trained: list[nn.Parameter]
    homes: Mapping[int, str]  # name of the module that holds a tensor, by the tensor's id
    averages: Mapping[Tensor, Tensor]
    differences: Differences
    steps_taken: int = 0
    _variables: dict[str, Any] = field(default_factory=dict)  # a loop's, until it has stepped

    def trained_names(self) -> Hashable:
        """Return which weights are trained."""
        named = self.model.named_parameters()
        return frozenset(name for name, weight in named if weight.requires_grad)

    def watch_optimizers(self) -> None:
        """Let the trace know when an optimizer steps, and make it step as on the target."""

        def begin(optimizer: Optimizer, *_: Any) -> None:
            if torch._C._current_autograd_node() is None:
                self._enter_gradients()
            self.trace.step_begins(counting=not _needs_closure(optimizer))

        def end(*_: Any) -> None:
            self.trace.step_ends()
            self.steps_taken += 1

        for optimizer in map(stepping, self.optimizers):
            if self.step.target == "cuda" and _foreach_by_default(optimizer):
                for group in optimizer.param_groups:
                    if group.get("foreach", False) is None and group.get("fused") is None:
                        group["foreach"] = True
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_pre_hook(begin)
                optimizer.register_step_post_hook(end)
            else:
                _watch_foreign(optimizer, begin, end)

    def enter_held(self) -> None:
        """Enter weights, buffers and optimizer state, which may be others than before."""
        held = [*self.model.parameters(), *self.model.buffers()]
        _enter(self.trace, held, "parameters", self.homes)
        for optimizer in self.optimizers:
            for owner, slots in getattr(optimizer, "state", {}).items():
                home = self.homes.get(id(owner), "")
                self.trace.enter(_tensors(slots), "optimizer_state", home)

    def _enter_gradients(self) -> None:
        for parameter in self.trained:
            if parameter.grad is not None:
                self.trace.enter([parameter.grad], "gradients", self.homes[id(parameter)])

    def take(self) -> None:
        """Take one step of the optimizer."""
        if self.step.step_fn is not None:
            self._take_the_users(self.step.step_fn)
        elif all(_needs_closure(optimizer) for optimizer in self.optimizers):
            self._step(self._closure)
        else:
            for left in reversed(range(min(self.step.micro_batches, 2))):
                with nullcontext() if left else self.step.last_backward():
                    self._backward()  # the second finds the first's gradients
            self._step(None)
        self._variables.clear()
        self.enter_held()

    def _take_the_users(self, step_fn: StepFn) -> None:
        batch = self._batch()
        self.differences.keep("batch", _tensors(batch))
        with self.trace.finding_phases(), self.differences.forward():
            step_fn(self.model, self.optimizer, batch)

    def _batch(self) -> Any:
        with self.trace.phase("forward"):
            self.fake.in_batch = True
            try:
                batch = _mapped(self.fake.here, self.step.batch())
            finally:
                self.fake.in_batch = False
            tensors = _tensors(batch)
            self.trace.enter(tensors, "inputs")
        self.differences.note_sequences(tensors)
        return batch

    def _backward(self) -> Tensor:
        """Run one forward and backward pass; return the loss."""
        assert self.step.loss_fn is not None
        batch = self._variables["batch"] = self._batch()
        parts = [part for part in _tensors(batch) if part.layout is torch.strided]
        before = [holders(part) for part in parts]
        with self.trace.phase("forward"), self.differences.forward():
            loss = _checked(self.step.loss_fn(self._forward(), batch))
        self._variables["loss"] = loss
        self.trace.mark("forward", "activations")
        self.differences.keep("loss and batch", [*_tensors(batch), loss])
        self.differences.note_batch(parts, before)
        with self.trace.phase("backward"):
            backward(loss)
        self._enter_gradients()
        return loss

    def _forward(self) -> Callable[..., Any]:
        forward = at_precision(self.model, self.step.precision)

        def noting(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            self.differences.keep("outputs", _tensors(outputs))
            return outputs

        return noting

    def _closure(self) -> Any:
        with self.trace.outside_step():
            self._zero()
            return self._backward()

    def _step(self, closure: Callable[[], Any] | None) -> None:
        with self.trace.phase("optimizer_step"):
            if self.step.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.step.clip_norm)
            for optimizer in self.optimizers:
                if closure is not None:
                    optimizer.step(closure)
                    continue
                try:
                    optimizer.step()
                except Exception as error:
                    if "closure" not in str(error):
                        raise
                    optimizer.step(self._closure)  # sharpness-aware: a second pass inside
            self._zero()

    def _zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def trace_step(
    step: Step, real: Limit | None = None, fake: HybridFakeMode | None = None
) -> tuple[StorageTrace, Differences]:
    """Take the steps and the evaluation batch, and return the record.

    With `real`, on real tensors of the CPU, which are all gone when this returns.

    Raises:
        UserError: what the given functions return is not what it should be.
        torch.OutOfMemoryError: from the limit that `real` makes.

    """
    shared = None if real else step.shared
    with step.prepared(real, fake) as prepared:
        trace, differences = prepared.trace, prepared.differences
        if shared is None or not shared.has_steps(step.keys[0]):
            alike = shared.alike if shared is not None else set()
            trained = prepared.trained_names()
            _take_steps(step, prepared, trained in alike)
            if differences.alike:
                alike.add(trained)
        begin = len(trace.events)
        if shared is None or not shared.has_evaluation(step.keys[1]):
            _evaluate(step, prepared)
        end = len(trace.events)
    if shared is None:
        return trace, differences
    keep = not prepared.fake.questions  # answers may be others next time
    return shared.joined(step.keys, trace, differences, begin, end, keep)


def _evaluate(step: Step, prepared: PreparedStep) -> None:
    if step.evaluation_fn is not None:
        prepared.model.eval()
        with prepared.trace.phase("evaluation"), torch.no_grad():
            step.evaluation_fn(at_precision(prepared.model, step.precision))


def _take_steps(step: Step, prepared: PreparedStep, alike: bool) -> None:
    """Take two steps, and more for as long as they differ.

    `alike`: those of the same loop with other techniques do not, and the second is not run.
    """
    differences = prepared.differences
    if step.step_fn is not None and step.precision != "fp32":
        prepared.model.forward = at_precision(prepared.model.forward, step.precision)
    prepared.model.train()
    started = time.perf_counter()
    while True:
        try:
            with differences.step():
                prepared.take()
        except StopIteration:  # a loader came to its end
            if not differences.count:
                raise UserError("batch_fn has no batch") from None
            break
        if alike and prepared.steps_taken and differences.repeat_step():
            return
        alike = False
        if differences.count >= PATIENCE and not prepared.steps_taken:
            break
        if differences.count < FEWEST_STEPS or not prepared.steps_taken:
            continue
        late = time.perf_counter() - started > MOST_SECONDS
        if not differences.found(step.batch) or late or differences.count >= MOST_STEPS:
            break
    if not prepared.steps_taken:
        raise UserError(
            f"step_fn called no optimizer's step() in {differences.count} batches; it gets "
            "(model, optimizer, batch) and must take one"
        )


def held_throughout(step: Step) -> dict[str, int]:
    """Return the bytes by category that a step holds whatever its forward pass does.

    Gradients are counted as if every trained parameter had one. Nothing is run but the
    optimizer, on fake tensors, and `step.batch_fn`.
    """
    with step.prepared() as prepared:
        trace = prepared.trace
        for parameter in prepared.trained:
            parameter.grad = torch.zeros_like(parameter)
            trace.enter([parameter.grad], "gradients")
        try:
            for optimizer in prepared.optimizers:
                stepping(optimizer).step()
        except Exception:
            log.info("the optimizer's state is not known", exc_info=True)
        prepared.enter_held()
        found: dict[str, int] = defaultdict(int)
        for number in trace.alive():
            storage = trace.storages[number]
            if storage.category:
                found[storage.category] += storage.bytes
    with _alone(), target_rules(step.target):
        held = _tensors(step.batch_fn())
        batch = {t.untyped_storage()._cdata: t.untyped_storage() for t in held}
    resident = {tensor.untyped_storage()._cdata for tensor in step.resident}
    found["inputs"] += sum(s.nbytes() for key, s in batch.items() if key not in resident)
    return dict(found)


log = logging.getLogger(__name__)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep a step and the rest of the process apart.

    A ledger that is on would count what is not there; random numbers that a model or a batch
    draws are not missing afterwards.
    """
    state = RandomState(torch.device("cpu"))
    fake_log = logging.getLogger(FAKE_LOG)
    disabled, fake_log.disabled = fake_log.disabled, True
    try:
        with _disable_current_modes(), torch.enable_grad(), warnings.catch_warnings():
            # A real tensor with a history is looked at when it meets fake ones.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            yield
    finally:
        fake_log.disabled = disabled
        state.restore()


def at_precision(model: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """Call the model under autocast, its outputs back in fp32, as Fabric does."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast(precision):
            outputs = model(*args, **kwargs)
        return outputs if precision == "fp32" else tree_map(_full_precision, outputs)

    return forward


def _resizes_told(trace: StorageTrace) -> AbstractContextManager[object]:
    """Tell a trace of storages that change their size, which only FSDP's do."""
    if SHARDING not in sys.modules:
        return nullcontext()
    from expt.memory.measuring.sharded import watching_sharded

    return watching_sharded(trace.resized)


def _full_precision(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"loss_fn must return a scalar tensor, got {got}; take its mean or sum")
    if not loss.requires_grad:
        raise UserError("the loss has no graph: it does not depend on a trained weight")
    return loss


def _optimizers(made: Any, parameters: list[nn.Parameter]) -> list[Optimizer]:
    """Return the optimizers in what `optimizer_fn` made: one, or a list, tuple or dict of some."""
    found = [value for value in tree_iter(made) if hasattr(value, "step")]
    held = {id(p) for optimizer in found for g in optimizer.param_groups for p in g["params"]}
    if not found or not held & {id(parameter) for parameter in parameters}:
        raise UserError(
            "optimizer_fn must return an optimizer (or a list of some) over the weights that it "
            f"is given, got {type(made).__name__} over {len(held)} others"
        )
    return found


def _watch_foreign(optimizer: Any, begin: Callable[..., None], end: Callable[..., None]) -> None:
    """Call `begin` and `end` around the steps of an optimizer that is none of torch's."""
    step = optimizer.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        begin(optimizer)
        try:
            return step(*args, **kwargs)
        finally:
            end(optimizer)

    optimizer.step = watched


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


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


def _mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a batch with its tensors changed; the batch itself where none of them is."""
    if all(change(tensor) is tensor for tensor in _tensors(batch)):
        return batch
    if not hasattr(batch, "__dataclass_fields__"):
        return tree_map_only(Tensor, change, batch)
    changed = copy.copy(batch)
    for name, value in vars(batch).items():
        object.__setattr__(changed, name, tree_map_only(Tensor, change, value))
    return changed


def _tensors(tree: Any) -> list[Tensor]:
    if hasattr(tree, "__dataclass_fields__"):
        tree = vars(tree)
    return [value for value in tree_iter(tree) if isinstance(value, Tensor)]
