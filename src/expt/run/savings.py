"""Which single change of a training's settings would save how much.

Every change is predicted like the settings themselves, so that advice is never a rule of thumb.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from expt.config.schema import Precision
from expt.memory.techniques.techniques import Techniques
from expt.run.planner import Planner
from expt.run.target import arithmetic

log = logging.getLogger(__name__)

FUSED = "optimizer.fused=true"
"""A change that is no technique: the step of all weights in one kernel, without copies of them."""
NO_TECHNIQUES = ("memory.precision=", FUSED, f"+{FUSED}")
"""Changes that recovery does not make: other arithmetic, another optimizer."""
MAX_CHUNKS = 4
"""Slices of a batch of evaluation that are advised, where it has as many samples."""
TRAINING = ("forward", "backward", "optimizer_step")
"""Phases that evaluation has no part in."""
MAX_SAVINGS = 3
MIN_SAVING = 0.01
"""Part of the peak that a change must save to be worth a line."""


@dataclass(frozen=True)
class Saving:
    """A change to the command line, the peak it is predicted to have, and `Plan.demand_bytes`.

    A change of several settings has a space between them.
    """

    change: str
    peak_bytes: int
    demand_bytes: int


def savings(planner: Planner) -> list[Saving]:
    """Return the single changes that would save most."""
    planned = planner.plan()
    evaluates = planned.phase not in TRAINING or planner.now.forward_chunks_in_training
    worth = (1 - MIN_SAVING) * planned.peak_bytes
    found = [saving for saving in single_changes(planner, evaluates) if saving.peak_bytes < worth]
    return sorted(found, key=lambda saving: saving.peak_bytes)[:MAX_SAVINGS]


def first_that_fits(planner: Planner, limit_bytes: int) -> Saving | None:
    """Return the cheapest single change that fits; dearer ones are not even planned."""
    return next((s for s in single_changes(planner) if s.demand_bytes <= limit_bytes), None)


def single_changes(planner: Planner, evaluates: bool = True) -> Iterator[Saving]:
    """Yield what every change by itself is predicted to come to, the cheapest change first.

    `evaluates`: also those that only make evaluation smaller.
    """
    yield from fused_optimizer(planner)
    for change, techniques, precision in _changes(planner, evaluates):
        try:
            then = planner.plan(techniques, precision)
        except Exception:  # the model may have nothing to apply it to, or not work with it
            log.info("no prediction for %s", change, exc_info=True)
            continue
        yield Saving(change, then.peak_bytes, then.demand_bytes)


def fused_optimizer(planner: Planner) -> Iterator[Saving]:
    """Yield a fused optimizer, where copies that an unfused step makes are the peak."""
    own = planner.settings.arguments["optimizer"]
    known = inspect.signature(planner.settings.target("optimizer")).parameters
    if planner.target != "cuda" or own.get("fused") or "fused" not in known:
        return
    if planner.plan().phase != "optimizer_step":
        return
    change = FUSED if "fused" in own else f"+{FUSED}"  # Hydra adds a key with + only
    optimizer = {**own, "fused": True}
    if own.get("foreach"):
        change, optimizer["foreach"] = f"{change} optimizer.foreach=null", None
    try:
        then = planner.like(optimizer=optimizer).plan()
    except Exception:
        log.info("no prediction for %s", change, exc_info=True)
        return
    yield Saving(change, then.peak_bytes, then.demand_bytes)


def _changes(
    planner: Planner, evaluates: bool
) -> Iterator[tuple[str, Techniques | None, Precision | None]]:
    """Yield single changes, the one that costs least time first."""
    now, memory = planner.now, planner.settings.memory
    if now.attention_kernel == "math":
        yield "memory.attention_kernel=fused", replace(now, attention_kernel="fused"), None
    parts = 4 * now.gradient_accumulation
    if (
        parts * planner.settings.trainer.devices <= planner.data.batch_size
        and not now.optimizer_in_backward
    ):
        change = f"memory.gradient_accumulation={parts}"
        yield change, replace(now, gradient_accumulation=parts), None
    if now.activation_checkpointing is not True:
        change = "memory.activation_checkpointing=true"
        yield change, replace(now, activation_checkpointing=True), None
    chunks = min(MAX_CHUNKS, planner.data.eval_batch_size)
    if evaluates and now.forward_chunks == 1 < chunks and not planner.settings.trainer.sharded:
        yield f"memory.forward_chunks={chunks}", replace(now, forward_chunks=chunks), None
    if not (now.weight_offload or planner.settings.trainer.sharded) and planner.target == "cuda":
        # Refused at once where no block has frozen weights.
        yield "memory.weight_offload=true", replace(now, weight_offload=True), None
    if arithmetic(memory.precision, planner.target) == "fp32":
        yield "memory.precision=bf16", None, Precision.bf16  # other results, so the last
