"""What takes the place of a trace where a model cannot be run on fake tensors.

A forward pass that looks at values (``if x.sum() > 0``, a mask that selects rows, NumPy) has no
shapes without them. If the model is small, the same step is taken for real on the CPU and read
like a trace; else what is known exactly is added up (weights, gradients, optimizer state,
inputs), and the plan has no upper bound, since activations are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    MetadataMismatchError,
    UnsupportedFakeTensorException,
    UnsupportedMutationAliasingException,
    UnsupportedOperatorException,
)

from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.measuring.device_memory import free_bytes
from expt.memory.planning.breakdown import read
from expt.memory.planning.peak_plan import CATEGORIES, Plan
from expt.memory.planning.traced_step import Step, held_throughout, trace_step
from expt.units import GIB, format_bytes

log = logging.getLogger(__name__)

UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    MetadataMismatchError,
    UnsupportedFakeTensorException,
    UnsupportedMutationAliasingException,
    UnsupportedOperatorException,
    # Tensors that a model hides were left on meta. torch 2.11 has only words for it, with
    # "FakeTensor" among them.
    *filter(None, [getattr(fake_tensor, "FakeTensorDeviceMismatchError", None)]),
)
UNTRACEABLE_WORDS = (
    "not supported for tensor subclasses",  # .numpy()
    "no fake impl registered",  # an operator of a library's own
    "no meta function",
    "with Meta tensors",
    "Cannot access data pointer of Tensor",
    "FakeTensor",
)
"""What the messages say of other errors that real tensors would not have raised (torch 2.13)."""
MAX_REAL_BYTES = GIB
MAX_REAL_SHARE = 0.25
"""A model is run for real if its weights take no more than this, and this share of what the host
has free; the step is given up where it would take more than `MAX_HOST_SHARE` of that."""
MAX_HOST_SHARE = 0.5
REAL_INTERVAL = (0.9, 1.2)
"""Bounds over the peak of a step that was taken: an assumption, since another batch may take
another way through the model."""


def untraceable(error: BaseException) -> str | None:
    """Return why a model cannot be run on fake tensors; None: `error` is about something else.

    An error that other code caught and raised anew is judged by what caused it.
    """
    for cause in _chain(error):
        if isinstance(cause, UNTRACEABLE) or any(word in str(cause) for word in UNTRACEABLE_WORDS):
            lines = str(cause).strip().splitlines()
            return f"{type(cause).__name__}: {lines[0][:200] if lines else ''}"
    return None


def estimate(step: Step, reason: str) -> Plan:
    """Return the weaker estimate of a step that cannot be traced, for the reason given.

    Raises:
        Exception: whatever the user's own code raises when it is run for real.

    """
    start = f"the model cannot be run on fake tensors ({reason})"
    weights = held_throughout(step)
    free = free_bytes(torch.device("cpu"))
    if weights["parameters"] <= min(MAX_REAL_BYTES, MAX_REAL_SHARE * free):
        try:
            return _taken(step, start, int(MAX_HOST_SHARE * free))
        except torch.OutOfMemoryError:
            log.info("the step is too large to be taken on the host", exc_info=True)
    return _added_up(step, start, weights)


def _taken(step: Step, start: str, limit_bytes: int) -> Plan:
    """Read a plan from a real step on the CPU that may take `limit_bytes`."""
    # fp16 has few kernels on the CPU, and bf16 takes as much.
    stand_in = replace(step, precision="bf16") if step.precision == "fp16" else step
    trace = trace_step(stand_in, lambda: BudgetLedger(limit_bytes))
    found = read(trace, step.target, 0.0)
    low, high = REAL_INTERVAL
    widest = found.interval_bytes[1]
    assert widest is not None
    return replace(
        found,
        method="estimate",
        interval_bytes=(
            int(found.peak_bytes * low), max(int(found.peak_bytes * high), widest),
        ),
        notes=(
            f"{start}; instead one step was taken for real on the CPU: another batch may take "
            "another way through the model",
            *found.notes,
        ),
    )  # fmt: skip


def _added_up(step: Step, start: str, known: dict[str, int]) -> Plan:
    """Add up what is known without running the model."""
    total = sum(known.values())
    by_module = {f"({name})": count for name, count in known.items() if count}
    return Plan(
        target=step.target,
        peak_bytes=total,
        reserved_bytes=None,
        interval_bytes=(total, None),
        phase="optimizer_step",
        by_category={**dict.fromkeys(CATEGORIES, 0), **known},
        by_module=dict(sorted(by_module.items(), key=lambda item: -item[1])),
        corrections={},
        method="estimate",
        seconds=0.0,
        notes=(
            f"{start}, and with {format_bytes(known['parameters'])} of weights it is too large to "
            "be run for real here; activations are NOT included",
        ),
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
