"""`plan`: the peak memory of a training step, predicted without a GPU and without the weights.

Steps of the optimizer (and one evaluation batch) run on fake tensors under a `StorageTrace`, as
the target device would run them: CUDA's autocast rules, its attention kernels, its allocator. What
was alive at the highest point is the prediction, sorted into categories and modules. Nothing has
to be known about the model; where it cannot be traced, a stated weaker estimate takes its place.

    from expt.memory import plan

    predicted = plan(
        model_fn=lambda: MyNet(width=512),
        batch_fn=lambda: (torch.randn(32, 512), torch.randint(10, (32,))),
        loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        optimizer_fn=lambda parameters: torch.optim.AdamW(parameters),
        target="cuda", precision="bf16",
    )
    print(predicted.peak_bytes, predicted.phase, predicted.by_category)

A loop of another form (several optimizers, a penalty on gradients, own accumulation) is given as
`step_fn(model, optimizer, batch)`, in the place of `loss_fn`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from expt.errors import UserError
from expt.memory.planning.breakdown import Reading
from expt.memory.planning.estimate import Traced, instead_of_trace, reason, traced
from expt.memory.planning.fake import any_left, clear_leftovers, gc_frozen
from expt.memory.planning.plan import Plan, Precision, Target
from expt.memory.planning.traced_step import Step, StepFn

if TYPE_CHECKING:
    from expt.memory.planning.shared import Shared

LEFT = (
    "{count} tensors without values are still held by code outside the model, a cache of its own "
    "perhaps; clear it before training, or train in another process"
)

__all__ = ["Plan", "Precision", "Target", "plan"]


def plan(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    optimizer_fn: Callable[[list[nn.Parameter]], Any],
    loss_fn: Callable[[Callable[..., Any], Any], Tensor] | None = None,
    *,
    target: Target = "cuda",
    precision: Precision = "fp32",
    micro_batches: int = 1,
    clip_norm: float | None = None,
    evaluation_fn: Callable[[Callable[..., Any]], Any] | None = None,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    resident: Iterable[Tensor] = (),
    averaged: bool = False,
    step_fn: StepFn | None = None,
    holds_outputs: bool | None = None,
    lengths_vary: bool | None = None,
    limit_bytes: int | None = None,
    depth: int | None = None,
    blocks: bool = False,
    last_backward: Callable[[], AbstractContextManager[object]] = nullcontext,
    shared: Shared | None = None,
    keys: tuple[Hashable, Hashable] = ((), ()),
) -> Plan:
    """Predict the peak of training steps, and of an evaluation batch if one is given.

    The random state is afterwards what it was before, and a ledger that is on counts nothing.
    A model that `model_fn` did not make itself is copied and stays as it is.

    Args:
        model_fn: makes the model; called under ``torch.device("meta")``, and again without it
            if that does not work.
        batch_fn: makes one micro-batch; what it makes counts as inputs, and real tensors that
            it reads (a data set kept on the device) do too. Called a few times, to see whether
            batches differ.
        optimizer_fn: makes the optimizer for a list of parameters, or a list of several.
        loss_fn: from the model's forward and a batch to a scalar loss. An optimizer whose `step`
            needs a closure gets one.
        target: whose kernels, casting rules and allocator to assume.
        precision: arithmetic of the forward pass; parameters stay as the model makes them.
        micro_batches: forward and backward passes per optimizer step.
        clip_norm: clip gradients by their global norm, as training will.
        evaluation_fn: runs one evaluation batch, without gradients.
        prepare: puts memory techniques on the model.
        resident: tensors that are on the device throughout, like a data set kept there.
        averaged: an average of the weights is kept beside them.
        step_fn: takes one step of any form, given the model, what `optimizer_fn` made, and a
            batch; then `loss_fn`, `micro_batches` and `clip_norm` are not used.
        holds_outputs: whether the training loop keeps outputs, loss and batch of a step in
            variables until the next ones, as a script does that never deletes them. None: not
            known; the interval covers both, and the peak on CUDA assumes that it does.
        lengths_vary: whether batches of token sequences have other lengths, which leaves CUDA's
            allocator with blocks that do not fit. None: not known; assumed for few sequences.
        limit_bytes: what the card has for the allocator, which gives free segments back before it
            fails; None: more than enough.
        depth: levels of modules' names in `by_module`; None: large ones are split further.
        blocks: also keep what each block takes over time, for `Plan.blocks.split`.
        last_backward: makes a context for the last backward pass of a step, in which several
            processes sum gradients.
        shared: parts of other plans of this loop, which are taken over where their `keys` are the
            same. Not for a loop that holds outputs.
        keys: what the training steps depend on, and what evaluation does.

    Raises:
        UserError: a function returns what it should not, or the model refuses its arguments.
        Exception: what the given functions raise where the step does not work for real either.

    """
    started = time.perf_counter()
    if loss_fn is None and step_fn is None:
        raise UserError("plan needs a loss_fn(model, batch), or a step_fn(model, optimizer, batch)")
    step = Step(
        model_fn, batch_fn, optimizer_fn, loss_fn, target=target, precision=precision,
        micro_batches=micro_batches, clip_norm=clip_norm, evaluation_fn=evaluation_fn,
        prepare=prepare, resident=tuple(resident), averaged=averaged, step_fn=step_fn,
        last_backward=last_backward, shared=shared, keys=keys,
    )  # fmt: skip
    reading = Reading(target, depth, holds_outputs, lengths_vary, limit_bytes, blocks)
    with gc_frozen():
        found, failed = _traced(step, reading)
        # Outside the handler, whose traceback holds what the trace had made.
        left = any_left()
    count = clear_leftovers() if left else 0
    if found is None or found.steered:
        with gc_frozen():
            predicted = instead_of_trace(step, reading, found, failed)
            left = any_left()
        count = clear_leftovers() if left else count
    else:
        predicted = found.plan
    notes = (*predicted.notes, LEFT.format(count=count)) if count else predicted.notes
    return replace(predicted, notes=notes, seconds=time.perf_counter() - started)


def _traced(step: Step, reading: Reading) -> tuple[Traced | None, str]:
    """Trace a step on fake tensors, or say why that cannot be done."""
    try:
        return traced(step, reading), ""
    except UserError:
        raise
    except Exception as error:
        return None, reason(error)
