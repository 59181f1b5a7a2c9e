"""What goes wrong without a word: the handbook's gotchas, looked for in a run and its plan.

Each check answers from the plan, or from a second one that it makes only where the first shows
that the gotcha may apply. It is told where it costs `LEAST` of the peak (checkpointing that saves
nothing: of a step's arithmetic), with its bytes and the setting that changes it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expt.config.schema import Strategy
from expt.job import Batch, Split
from expt.memory.planning.plan import Plan
from expt.memory.techniques.repeated_blocks import repeated_blocks
from expt.run.planner import Planner
from expt.units import MIB, format_bytes

log = logging.getLogger(__name__)

LEAST = 0.02
"""Share of the peak that a gotcha has to cost."""
FEW_BLOCKS = 12
"""Blocks below which checkpointing may not pay, by the handbook; it is then planned without."""
STATE_OVER_REST = 2.0
"""How many times all that a batch takes the optimizer's state is where it is told."""
LARGE_OVER_USUAL = 2.0
"""How many times the usual image's pixels the largest has where it is told."""
SEGMENTS = 64 * MIB
"""What the allocator reserves in segments that are not full, whatever the sizes: one of 20 MiB for
requests of middling size, one beside the large ones, cuBLAS's, and small ones."""
IMAGE = 3
"""Axes that an image has at least."""


@dataclass(frozen=True)
class Gotcha:
    """One of them: its name, what it costs, the setting that changes it, and a sentence.

    `share` is what it costs of the peak, or of a step's arithmetic where that is what is lost.
    """

    name: str
    bytes: int
    share: float
    change: str
    words: str

    def line(self) -> str:
        """Return it for a reader."""
        return f"gotcha: {self.words}: {self.change}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``plan.json``."""
        return asdict(self)


def gotchas(planner: Planner) -> list[Gotcha]:
    """Return those of a run that are worth a line, the dearest first."""
    planned = planner.plan()
    if planned.interval_bytes[1] is None:  # without activations shares of the peak say nothing
        return []
    found = []
    for check in CHECKS:
        try:
            gotcha = check(planner, planned)
        except Exception:  # the other plan may be of what the model cannot do
            log.info("%s could not be looked for", check.__name__, exc_info=True)
            continue
        if gotcha is not None and gotcha.share >= LEAST:
            found.append(gotcha)
    return sorted(found, key=lambda gotcha: -gotcha.share)


def tiny_checkpointing(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find checkpointing that takes time and saves next to nothing."""
    if planner.now.activation_checkpointing is False:
        return None
    few = len(repeated_blocks(planner.model())) < FEW_BLOCKS
    if not few and planned.phase != "optimizer_step":
        return None
    without = replace(planner.now, activation_checkpointing=False)
    saved = planner.plan(without).peak_bytes - planned.peak_bytes
    if saved >= LEAST * planned.peak_bytes:
        return None
    lost = planner.operations() / planner.operations(without) - 1
    what = f"saves {format_bytes(saved)}" if saved > 0 else "saves nothing"
    return Gotcha(
        "tiny_checkpointing", max(saved, 0), lost, "memory.activation_checkpointing=false",
        f"checkpointing {what} of {format_bytes(planned.peak_bytes)} here, and computes "
        f"{lost:.0%} more",
    )  # fmt: skip


def forgotten_state(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find a peak that is the optimizer's state, which a smaller batch does not change."""
    parts = planned.by_category
    state = parts["optimizer_state"]
    of_batch = ["activations", "inputs"]
    if planned.phase != "optimizer_step":  # whose temporaries are the optimizer's
        of_batch += ["temporaries", "workspaces"]
    batch = sum(parts[name] for name in of_batch)
    if state < STATE_OVER_REST * batch or state < LEAST * planned.peak_bytes:
        return None
    return _of(
        planned, "forgotten_state", state, "optimizer=adafactor",
        f"the optimizer's state takes {format_bytes(state)} from the second step on, and a batch "
        f"only {format_bytes(batch)}, so that a smaller batch saves little",
    )  # fmt: skip


def large_image(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find a batch that one image makes large."""
    sizes = getattr(planner.data, "sizes", ())
    if not isinstance(sizes, Sequence) or len(sizes) < 2 or not hasattr(planner.data, "example"):
        return None
    by_pixels = sorted(sizes, key=lambda size: size[0] * size[1])
    largest, usual = by_pixels[-1], by_pixels[len(by_pixels) // 2]
    if largest[0] * largest[1] < LARGE_OVER_USUAL * usual[0] * usual[1]:
        return None
    other = planner.like(data=_OfUsualSize(planner.data, largest, usual))
    saved = planned.peak_bytes - other.plan().peak_bytes
    return _of(
        planned, "large_image", saved,
        "bring images to one size (expt.jobs.vision.resolution), or cap their tiles",
        f"one image of {largest[0]}x{largest[1]} makes its whole batch as large, "
        f"{format_bytes(saved)} more than the usual {usual[0]}x{usual[1]}",
    )  # fmt: skip


def per_image_copies(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find a model that takes a batch apart and copies it image by image."""
    if planner.settings.memory.cached_features is not None:
        return None
    model_fn, batch_fn, _, loss_fn, prepare = planner.parts()
    batch = batch_fn()[0]
    if sum(value.nbytes for value in batch.inputs.values()) < LEAST * planned.peak_bytes:
        return None
    from expt.memory.planning.image_copies import copied_bytes

    copied, count = copied_bytes(model_fn, batch_fn, loss_fn, prepare, planner.target)
    return _of(
        planned, "per_image_copies", copied,
        "hand the batch on as it is, and move it once",
        f"{count} copies of parts of a batch are made, {format_bytes(copied)} in all",
    )  # fmt: skip


def whole_model_everywhere(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find processes of which every one holds the whole model."""
    trainer = planner.settings.trainer
    parts = planned.by_category
    held = sum(parts[name] for name in ("parameters", "gradients", "optimizer_state"))
    if trainer.devices == 1 or trainer.sharded or held < LEAST * planned.peak_bytes:
        return None
    sharded = planner.like(trainer=replace(trainer, strategy=Strategy.fsdp))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FSDP, which nobody asked for
        saved = planned.peak_bytes - sharded.plan().peak_bytes
    return _of(
        planned, "whole_model_everywhere", saved, "trainer.strategy=fsdp",
        f"each of {trainer.devices} processes loads the whole model, "
        f"{format_bytes(saved)} more than a part",
    )  # fmt: skip


def foreach_step(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find an optimizer whose copies of all weights are the peak."""
    if planned.phase != "optimizer_step":
        return None
    from expt.run.savings import fused_optimizer

    for saving in fused_optimizer(planner):
        saved = planned.peak_bytes - saving.peak_bytes
        return _of(
            planned, "foreach_step", saved, saving.change,
            f"the optimizer's step is the peak, by {format_bytes(saved)} of copies that foreach "
            "makes of the weights",
        )  # fmt: skip
    return None


def math_attention(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find attention whose matrix of weights is kept."""
    if planner.now.attention_kernel != "math":
        return None
    fused = planner.plan(replace(planner.now, attention_kernel="fused"))
    saved = planned.peak_bytes - fused.peak_bytes
    return _of(
        planned, "math_attention", saved, "memory.attention_kernel=fused",
        f"attention keeps its matrices, {format_bytes(saved)} at the peak",
    )  # fmt: skip


def odd_sizes(planner: Planner, planned: Plan) -> Gotcha | None:
    """Find memory that is reserved in pieces which later requests do not fit into."""
    if planned.requests is None or planned.reserved_bytes is None:
        return None
    if planned.reserved_bytes - planned.peak_bytes < LEAST * planned.peak_bytes + SEGMENTS:
        return None
    from expt.memory.planning.allocator import served

    allocator = served(planned.requests.changes)
    left = allocator.peak_reserved_bytes - allocator.peak_allocated_bytes - SEGMENTS
    sizes = {change for _, change in planned.requests.changes if change > 0}
    vary = any("other shapes" in note for note in planned.notes)
    return _of(
        planned, "odd_sizes", left,
        "PYTORCH_ALLOC_CONF=expandable_segments:True"
        + (", or pad batches to a few sizes" if vary else ""),
        f"{len(sizes)} different sizes are asked for, and {format_bytes(left)} more are reserved "
        "than are ever used",
    )  # fmt: skip


CHECKS: tuple[Callable[[Planner, Plan], Gotcha | None], ...] = (
    tiny_checkpointing,
    forgotten_state,
    large_image,
    per_image_copies,
    whole_model_everywhere,
    foreach_step,
    math_attention,
    odd_sizes,
)


def _of(planned: Plan, name: str, count: int, change: str, words: str) -> Gotcha:
    return Gotcha(name, count, count / planned.peak_bytes, change, words)


class _OfUsualSize:
    """A data set whose examples have images of another size."""

    def __init__(self, data: Any, largest: tuple[int, int], usual: tuple[int, int]) -> None:
        self._data, self._largest, self._usual = data, tuple(largest), tuple(usual)
        # Made here, so that a trace does not see images of the largest size.
        splits: tuple[Split, ...] = ("train", "val")
        self._one = {split: data.example(split, 1) for split in splits}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._data, name)

    def example(self, split: Split, count: int) -> Batch:
        """Return a batch of the usual size."""

        def usual(value: Tensor) -> Tensor:
            shape = tuple(value.shape[1:])
            if value.ndim >= IMAGE and shape[-2:] == self._largest:
                shape = (*shape[:-2], *self._usual)
            return torch.zeros((count, *shape), dtype=value.dtype)

        batch: Batch = self._one[split].each(usual)
        return batch
