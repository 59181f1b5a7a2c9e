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
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from expt.memory.planning.breakdown import read
from expt.memory.planning.estimate import estimate, untraceable
from expt.memory.planning.leftovers import any_left, clear_leftovers, older_objects_aside
from expt.memory.planning.peak_plan import Plan, Precision, Target
from expt.memory.planning.traced_step import Step, trace_step

LEFT = (
    "{count} tensors without values are still held by code outside the model, a cache of its own "
    "perhaps; clear it before training, or train in another process"
)

__all__ = ["Plan", "Precision", "Target", "plan"]


def plan(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    optimizer_fn: Callable[[list[nn.Parameter]], Optimizer],
    loss_fn: Callable[[Callable[..., Any], Any], Tensor],
    *,
    target: Target = "cuda",
    precision: Precision = "fp32",
    micro_batches: int = 1,
    clip_norm: float | None = None,
    evaluation_fn: Callable[[Callable[..., Any]], Any] | None = None,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    resident: Iterable[Tensor] = (),
    averaged: bool = False,
) -> Plan:
    """Predict the peak of one optimizer step, and of an evaluation batch if one is given.

    The random state is afterwards what it was before, and a ledger that is on counts nothing.

    Args:
        model_fn: builds the model; called under ``torch.device("meta")``, and again without it
            if that does not work.
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
        Exception: what else the given functions raise, when it is not about fake tensors.

    """
    started = time.perf_counter()
    step = Step(
        model_fn, batch_fn, optimizer_fn, loss_fn, target=target, precision=precision,
        micro_batches=micro_batches, clip_norm=clip_norm, evaluation_fn=evaluation_fn,
        prepare=prepare, resident=tuple(resident), averaged=averaged,
    )  # fmt: skip
    found, reason = None, ""
    with older_objects_aside():
        try:
            found = read(trace_step(step), target, time.perf_counter() - started)
        except Exception as error:
            found_reason = untraceable(error)
            if found_reason is None:
                raise
            reason = found_reason
        # Outside the handler, whose traceback holds what the trace had made.
        left = any_left()
    count = clear_leftovers() if left else 0
    if found is None:
        found = replace(estimate(step, reason), seconds=time.perf_counter() - started)
    return replace(found, notes=(*found.notes, LEFT.format(count=count))) if count else found
