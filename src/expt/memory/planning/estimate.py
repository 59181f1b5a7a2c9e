"""A step on fake tensors, and what takes its place where that cannot be done or is not enough.

Code that looks at values computed from weights (``if x.sum() > 0``, NumPy, a mask that selects
rows) has none on fake tensors. If the model is small, the same step is taken for real on the CPU
and read like a trace. Else the trace stands with the answers that it was given; and where there is
no trace, what is known exactly is added up (weights, gradients, optimizer state, inputs), and the
plan has no upper bound, since activations are missing.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from expt.errors import UserError
from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.memory.measuring.device_memory import free_bytes
from expt.memory.planning.breakdown import Reading
from expt.memory.planning.hybrid import HybridFakeMode, is_library
from expt.memory.planning.plan import CATEGORIES, Plan
from expt.memory.planning.traced_step import Step, held_throughout, trace_step
from expt.units import GIB, format_bytes

log = logging.getLogger(__name__)

MAX_REAL_BYTES = GIB
MAX_REAL_SHARE = 0.25
"""A model is run for real if its weights take no more than this, and this share of what the host
has free; the step is given up where it would take more than `MAX_HOST_SHARE` of that."""
MAX_HOST_SHARE = 0.5
REAL_INTERVAL = (0.9, 1.2)
"""Bounds over the peak of a step that was taken: an assumption, since another batch may take
another way through the model."""


@dataclass(frozen=True)
class Traced:
    """The plan of a step on fake tensors; `questions` are what it asked of values, and where."""

    plan: Plan
    questions: tuple[tuple[str, str], ...]
    steered: bool
    answer: bool


def traced(step: Step, reading: Reading, answer: bool = False) -> Traced:
    """Trace a step on fake tensors; `answer` is given to questions about booleans.

    Code that stops at one answer (``assert torch.isfinite(loss)``) is given the other.

    Raises:
        Exception: whatever the user's own code or torch raises.

    """
    fake = HybridFakeMode(answer)
    try:
        trace, differences = trace_step(step, fake=fake)
    except UserError:
        raise
    except Exception:
        if answer or not any(asked == "a boolean" for asked, _ in fake.questions):
            raise
    else:
        found = reading.of(trace, differences)
        return Traced(found, tuple(sorted(fake.questions)), fake.steered, answer)
    return traced(step, reading, answer=True)


def reason(error: BaseException) -> str:
    """Return what went wrong, and in which line of the user's code."""
    chain = list(_chain(error))
    lines = str(chain[-1]).strip().splitlines()
    what = f"{type(chain[-1]).__name__}: {lines[0][:200] if lines else ''}"
    frames = [frame for cause in chain for frame in traceback.extract_tb(cause.__traceback__)]
    users = [frame for frame in frames if not is_library(frame.filename)]
    return f"{what} at {users[-1].filename}:{users[-1].lineno}" if users else what


def instead_of_trace(step: Step, reading: Reading, found: Traced | None, failed: str) -> Plan:
    """Return the plan of a step whose trace failed, or was steered by answers.

    Raises:
        Exception: whatever the user's own code raises when it is run for real as well.

    """
    if found is not None:
        failed = f"it decides on values: {_words(found.questions)}"
    start = f"the model cannot be run on fake tensors ({failed})"
    weights = held_throughout(step) if found is None else _known(step)
    free = free_bytes(torch.device("cpu"))
    small = weights is not None and weights["parameters"] <= min(
        MAX_REAL_BYTES, MAX_REAL_SHARE * free
    )
    if found is not None:
        small = small and found.plan.peak_bytes <= MAX_HOST_SHARE * free
    if small:
        try:
            return _taken(step, reading, start, int(MAX_HOST_SHARE * free))
        except torch.OutOfMemoryError:
            log.info("the step is too large to be taken on the host", exc_info=True)
    if found is not None:
        return _answered(step, reading, found)
    assert weights is not None  # held_throughout raised otherwise
    return _added_up(step, start, weights)


def _known(step: Step) -> dict[str, int] | None:
    try:
        return held_throughout(step)
    except Exception:
        log.info("what a step holds is not known", exc_info=True)
        return None


def _words(questions: tuple[tuple[str, str], ...]) -> str:
    asked = [f"{what} at {where}" if where else what for what, where in questions]
    more = f" and {len(asked) - 2} more" if len(asked) > 2 else ""
    return ", ".join(asked[:2]) + more


def _answered(step: Step, reading: Reading, found: Traced) -> Plan:
    """Keep a trace with its answers, and look at the other answer as well."""
    plans = [found.plan]
    other = ""
    if not found.answer:
        try:
            plans.append(traced(step, reading, answer=True).plan)
            other = " (the interval covers True)"
        except Exception:
            log.info("the other answer leads nowhere", exc_info=True)
    lows, highs = zip(*(one.interval_bytes for one in plans), strict=True)
    highest = None if None in highs else int(max(highs) * REAL_INTERVAL[1])
    note = (
        f"values that are not known decide: {_words(found.questions)}; answered {found.answer} for "
        f"a boolean{other}, 1 for a count, and all where elements are selected"
    )
    return replace(
        found.plan,
        interval_bytes=(int(min(lows) * REAL_INTERVAL[0]), highest),
        notes=(note, *found.plan.notes),
    )


def _taken(step: Step, reading: Reading, start: str, limit_bytes: int) -> Plan:
    """Read a plan from real steps on the CPU that may take `limit_bytes`."""
    # fp16 has few kernels on the CPU, and bf16 takes as much.
    stand_in = replace(step, precision="bf16") if step.precision == "fp16" else step
    trace, differences = trace_step(stand_in, lambda: BudgetLedger(limit_bytes))
    found = reading.of(trace, differences)
    low, high = REAL_INTERVAL
    lowest, widest = found.interval_bytes
    return replace(
        found,
        method="estimate",
        interval_bytes=(
            min(int(found.peak_bytes * low), lowest),
            None if widest is None else max(int(found.peak_bytes * high), widest),
        ),
        notes=(
            f"{start}; instead steps were taken for real on the CPU: another batch may take "
            "another way through the model",
            *found.notes,
        ),
    )


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
