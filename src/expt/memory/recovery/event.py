"""`OomEvent`: one time that memory ran out, as it is recorded and as it is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from expt.memory.techniques.techniques import Techniques
from expt.units import format_bytes

if TYPE_CHECKING:
    from expt.memory.recovery.attempt import Failure
    from expt.memory.recovery.ladder import Move


THRASHING = "thrashing"
PHASES = {
    "build": "while building the model and placing the data",
    "resume": "while loading the checkpoint",
    "epoch": "at the beginning of an epoch",
    "loop": "between two steps",
    "step": "in a step",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer_step": "in the optimizer's step",
    "evaluation": "in evaluation",
    "capture": "while capturing the step",
    "conclusion": "while the run was concluded",
    THRASHING: "almost: the allocator retries step after step,",
}
"""Words for every phase in which memory may run out."""
RUNGS = {
    "eager": "the captured step is given up",
    "release": "what was held ready is released",
    "one_by_one": "the optimizer steps weights one by one",
    "fused_attention": "attention is fused",
    "halve_micro_batch": "the batch is cut into twice as many parts",
    "activation_checkpointing": "blocks are computed again in the backward pass",
    "saved_tensor_offload": "activations wait in host memory",
    "halve_evaluation_batch": "evaluation takes half as many samples at a time",
}
"""What each rung does."""


@dataclass(frozen=True)
class OomEvent:
    """One failure to allocate and what was done about it.

    `step` and `epoch` are those that were under way, counted from 0. `rung` is None where nothing
    was left to try; `replayed` says that the run went back to its last checkpoint. `exact` says
    that the step is the same in other words, to rounding; it is false where the batch was cut and
    the model normalises over it, then over `samples_per_statistic` at a time. `rank` is of the
    process that it happened in, where several train together.
    """

    phase: str
    step: int
    epoch: int
    cause: str
    bytes_requested: int | None
    bytes_free: int | None
    budget_bytes: int | None
    rung: str | None
    skipped: list[dict[str, str]]
    techniques: dict[str, Any]
    evaluation_batch_size: int | None = None
    replayed: bool = False
    evidence: list[str] = field(default_factory=list)
    exact: bool = True
    samples_per_statistic: int | None = None
    rank: int | None = None

    @classmethod
    def of(
        cls,
        phase: str,
        position: tuple[int, int],
        failure: Failure,
        move: Move,
        techniques: Techniques,
        *,
        budget_bytes: int | None,
        evaluation_batch_size: int | None,
        replayed: bool,
        samples_per_statistic: int | None = None,
    ) -> OomEvent:
        """Return the record of a failure at a position (step, epoch) and of the move made then.

        `techniques` are those in force after the move.
        """
        step, epoch = position
        return cls(
            phase,
            step,
            epoch,
            failure.figures.cause,
            failure.figures.bytes_requested,
            failure.figures.bytes_free,
            budget_bytes,
            move.rung,
            [dict(vars(skipped)) for skipped in move.skipped],
            dict(vars(techniques)),
            evaluation_batch_size,
            replayed,
            [str(path) for path in failure.evidence],
            samples_per_statistic is None,
            samples_per_statistic,
            failure.rank,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the event as plain values."""
        return asdict(self)

    def line(self) -> str:
        """Return one line for a reader."""
        where = PHASES.get(self.phase, self.phase)
        asked = ""
        if self.bytes_requested is not None:
            asked = f" (asked for {format_bytes(self.bytes_requested)}"
            asked += "" if self.bytes_free is None else f", {format_bytes(self.bytes_free)} free"
            asked += ")"
        if self.rung is None:
            then = "nothing is left to try"
        else:
            then = RUNGS.get(self.rung, self.rung)
            if self.phase not in (THRASHING, "capture"):
                then += ", and it is done again"
            then += " from the last checkpoint" if self.replayed else ""
        if self.samples_per_statistic is not None:
            then += (
                f"; batch normalisation is now over {self.samples_per_statistic} samples, so the "
                "result is not the same (memory.batch_norm=group or frozen keeps it)"
            )
        at = f"step {self.step}" if self.rank is None else f"step {self.step} on rank {self.rank}"
        return f"out of memory {where} at {at}{asked}: {then}"
