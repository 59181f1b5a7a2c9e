"""`plan`: the peak memory of a training step, predicted without a GPU and without the weights.

One optimizer step (and one evaluation batch) runs on fake tensors under a `StorageTrace`, as the
target device would run it: CUDA's autocast rules, its attention kernels, its allocator. What was
alive at the highest point is the prediction, sorted into categories and modules. Nothing has to
be known about the model; where it cannot be traced, a stated weaker estimate takes its place.

    from expt.memory import plan

    predicted = plan(
        model_fn=lambda: MyNet(width=512),
        batch_fn=lambda: (torch.randn(32, 512), torch.randint(10, (32,))),
        loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        optimizer_fn=lambda parameters: torch.optim.AdamW(parameters),
        target="cuda", precision="bf16",
    )
    print(predicted.peak_bytes, predicted.phase, predicted.by_category)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from expt.memory.allocator import CachingAllocator, rounded
from expt.memory.casting import autocast, backward, target_rules
from expt.memory.fake import build_fake, fake_mode
from expt.memory.scratch import cpu_scratch
from expt.memory.trace import StorageTrace, find_peak

Target = Literal["cuda", "cpu"]
CATEGORIES = (
    "parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs",
    "workspaces",
)  # fmt: skip
INTERVALS: Mapping[Target, tuple[float, float]] = {"cpu": (0.95, 1.05), "cuda": (0.95, 1.08)}
"""The bounds over the predicted peak. For the CPU: every row of benchmarks/prediction.py lies
inside. For CUDA: an assumption until benchmarks/gpu_memory.py has been run on a card."""
SLACK: Mapping[Target, int] = {"cpu": 2**18, "cuda": 64 * 2**20}
"""Bytes added to the upper bound: packing in matrix products; larger library workspaces."""
CUBLAS_WORKSPACE = 8519680
"""cuBLAS's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 (32 MiB on Hopper is in the slack)."""
CUBLAS_SEGMENT = 20 * 2**20
NOTES: Mapping[Target, tuple[str, ...]] = {
    "cpu": (),
    "cuda": (
        "block rounding to 512 bytes, a fused attention kernel without a dropout mask, and "
        "CUDA's autocast rules are in the trace; recurrent layers are traced without cuDNN",
    ),
}
MODULE_DEPTH = 3
"""Levels of a module's name that the breakdown by module keeps."""


@dataclass(frozen=True)
class Plan:
    """A predicted peak of bytes allocated to tensors, and where it comes from.

    `by_category` sums exactly to `peak_bytes`; `interval_bytes` is [low, high]; `reserved_bytes`
    is what the caching allocator takes from the device (None where there is none).
    """

    target: Target
    peak_bytes: int
    reserved_bytes: int | None
    interval_bytes: tuple[int, int | None]
    phase: str
    by_category: Mapping[str, int]
    by_module: Mapping[str, int]
    corrections: Mapping[str, int]
    method: Literal["trace", "estimate"]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def dominant(self) -> str:
        """The category that takes most of the peak."""
        return max(self.by_category, key=lambda name: self.by_category[name])

    def fits(self, budget_bytes: int | None) -> bool | None:
        """Tell whether the predicted peak is inside a budget; None without one."""
        return None if budget_bytes is None else self.peak_bytes <= budget_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``plan.json``."""
        return {**asdict(self), "interval_bytes": list(self.interval_bytes)}


def plan(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    optimizer_fn: Callable[[list[nn.Parameter]], Optimizer],
    loss_fn: Callable[[Callable[..., Any], Any], Tensor],
    *,
    target: Target = "cuda",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    micro_batches: int = 1,
    clip_norm: float | None = None,
    evaluation_fn: Callable[[Callable[..., Any]], Any] | None = None,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    resident: Iterable[Tensor] = (),
    averaged: bool = False,
) -> Plan:
    """Predict the peak of one optimizer step, and of an evaluation batch if one is given.

    Args:
        model_fn: builds the model; called under ``torch.device("meta")``.
        batch_fn: makes one micro-batch; what it makes counts as inputs, and real tensors that
            it reads (a data set kept on the device) do too.
        optimizer_fn: makes the optimizer for a list of parameters.
        loss_fn: from the model's forward and a batch to a scalar loss.
        target: whose kernels, casting rules and allocator to assume.
        precision: arithmetic of the forward pass; parameters stay as the model makes them.
        micro_batches: forward and backward passes per optimizer step.
        clip_norm: clip gradients by their global norm, as training will.
        evaluation_fn: runs one evaluation batch, without gradients.
        prepare: puts memory techniques on the model.
        resident: tensors that are on the device throughout, like a data set kept there.
        averaged: an average of the weights is kept beside them.

    Raises:
        UserError: the model's own constructor or forward refuses its arguments.

    """
    started = time.perf_counter()
    with _disable_current_modes():  # a ledger that is on would count what is not there
        trace = trace_step(
            model_fn, batch_fn, optimizer_fn, loss_fn, target=target, precision=precision,
            micro_batches=micro_batches, clip_norm=clip_norm, evaluation_fn=evaluation_fn,
            prepare=prepare, resident=resident, averaged=averaged,
        )  # fmt: skip
    return _read(trace, target, time.perf_counter() - started)


def trace_step(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    optimizer_fn: Callable[[list[nn.Parameter]], Optimizer],
    loss_fn: Callable[[Callable[..., Any], Any], Tensor],
    *,
    target: Target,
    precision: str,
    micro_batches: int,
    clip_norm: float | None,
    evaluation_fn: Callable[[Callable[..., Any]], Any] | None,
    prepare: Callable[[nn.Module], None],
    resident: Iterable[Tensor],
    averaged: bool,
) -> StorageTrace:
    """Run the step on fake tensors and return the record; see `plan` for the arguments."""
    mode = fake_mode()
    model = build_fake(model_fn, mode)
    prepare(model)
    trace = StorageTrace(cpu_scratch if target == "cpu" else None)
    forward = _forward(model, precision)
    with target_rules(target, precision), mode, trace, trace.naming(model):
        parameters = list(model.parameters())
        trace.enter([*parameters, *model.buffers()], "parameters")
        trace.enter(resident, "inputs")
        average = [torch.empty_like(p) for p in parameters if averaged and p.requires_grad]
        trace.enter(average, "parameters")
        optimizer = optimizer_fn(parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        _make_state(trace, optimizer, trained, target)
        model.train()
        for _ in range(min(micro_batches, 2)):  # the second finds the first one's gradients
            with trace.phase("forward"):
                batch = batch_fn()
                trace.enter(_tensors(batch), "inputs")
                loss = loss_fn(forward, batch)
            _mark(trace, "forward", "activations")
            with trace.phase("backward"):
                backward(loss)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        trace.enter(gradients, "gradients")
        del gradients
        with trace.phase("optimizer_step"):
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        del loss, batch
        if evaluation_fn is not None:
            model.eval()
            with trace.phase("evaluation"), torch.no_grad():
                evaluation_fn(forward)
    return trace


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
    if target == "cuda":
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # torch's default for parameters on CUDA
    with trace.phase("optimizer_state"):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    state = [value for slots in optimizer.state.values() for value in slots.values()]
    trace.enter(_tensors(state), "optimizer_state")


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


def _read(trace: StorageTrace, target: Target, seconds: float) -> Plan:
    """Turn a trace into the plan: peak, breakdown, corrections, interval."""
    size = rounded if target == "cuda" else int
    start = next(
        index for index, event in enumerate(trace.events) if trace.phases[event[2]] == "forward"
    )
    peak = find_peak(trace, size, start)
    by_category = dict.fromkeys(CATEGORIES, 0)
    by_module: dict[str, int] = defaultdict(int)
    for number, count in peak.alive.items():
        storage = trace.storages[number]
        by_category[_category(storage)] += count
        by_module[_module(storage)] += count
    corrections = dict(peak.scratch)
    reserved = None
    if target == "cuda":
        allocator = _served(trace)
        exact = sum(peak.alive.values())
        corrections["blocks not split"] = max(0, allocator.peak_allocated_bytes - exact)
        corrections["cuBLAS workspace"] = CUBLAS_WORKSPACE
        reserved = allocator.peak_reserved_bytes + CUBLAS_SEGMENT
    by_category["workspaces"] = sum(corrections.values())
    total = sum(by_category.values())
    low, high = INTERVALS[target]
    return Plan(
        target=target,
        peak_bytes=total,
        reserved_bytes=reserved,
        interval_bytes=(int(total * low), int(total * high) + SLACK[target]),
        phase=peak.phase,
        by_category=by_category,
        by_module=dict(sorted(by_module.items(), key=lambda item: -item[1])),
        corrections=corrections,
        method="trace",
        seconds=seconds,
        notes=NOTES[target],
    )


def _category(storage: Any) -> str:
    if storage.category:
        return str(storage.category)
    return "temporaries" if storage.made else "inputs"


def _module(storage: Any) -> str:
    if storage.module:
        return ".".join(storage.module.split(".")[:MODULE_DEPTH])
    return f"({storage.category or storage.phase})"


def _served(trace: StorageTrace) -> CachingAllocator:
    """Return the caching allocator after it served the trace's requests."""
    allocator = CachingAllocator()
    live: dict[int, int] = defaultdict(int)
    for number, change, _ in trace.events:
        if live[number]:
            allocator.free(number)
        live[number] += change
        if live[number]:
            allocator.allocate(number, live[number])
    return allocator
