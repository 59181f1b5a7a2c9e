"""The ladder: what is tried, in which order, when a training step runs out of memory.

A rung maps the techniques in force to others that take less, or says why it does not apply here.
Rungs are data; `descend` takes the first that helps, `adapt` as many as it takes to fit a budget
that is known beforehand. The effective batch is kept by every rung. No torch at import.

The order is that of the slowdown: a fused attention kernel costs nothing, a smaller micro-batch
little, checkpointing one more forward pass, offload the transfers to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from expt.errors import ConfigError
from expt.memory.recovery.undo import step_one_by_one, why_not
from expt.memory.techniques.techniques import Techniques, techniques_from
from expt.units import format_bytes

Predict = Callable[[Techniques], int | None]
"""Peak in bytes with these techniques; None: not known."""
Refuse = Callable[[Techniques], str | None]
"""Why the model cannot be run with these techniques; None: it can."""
MIN_SAVING = 0.02
"""A rung predicted to save a smaller part of the peak is skipped: predictions are not better."""


@dataclass(frozen=True)
class Situation:
    """Where memory ran out.

    Args:
        micro_batch: samples in the largest micro-batch with the techniques in force.
        device: its type, ``cuda`` or ``cpu``.
        samples: in the batch of a step, the most parts that it can be taken in; None: not known.
        evaluated: samples in a batch of evaluation, likewise.

    """

    micro_batch: int
    device: str
    samples: int | None = None
    evaluated: int | None = None


@dataclass(frozen=True)
class Rung:
    """One step down; `change` returns other techniques, or why it does not apply."""

    name: str
    change: Callable[[Techniques, Situation], Techniques | str]


@dataclass(frozen=True)
class Skipped:
    """A rung that was passed over, and why."""

    rung: str
    reason: str


@dataclass(frozen=True)
class Move:
    """What a descent came to; `techniques` is None where nothing was left to try."""

    rung: str | None
    techniques: Techniques | None
    skipped: tuple[Skipped, ...]


def fuse_attention(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Stop materialising attention weights."""
    kernel = techniques.attention_kernel
    if kernel == "math":
        return replace(techniques, attention_kernel="fused")
    if kernel is None:
        return "the model's own attention kernel is in force (memory.attention_kernel=null)"
    if kernel == "fused":
        return "the attention kernel is fused already"
    return f"{kernel} computes something else than fused attention"


def halve_micro_batch(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Take twice as many micro-batches of half the size; the batch of a step stays the same."""
    if situation.micro_batch <= 1:
        return "the micro-batch is a single sample already"
    if techniques.optimizer_in_backward:
        return "memory.optimizer_in_backward=true steps before other micro-batches have added"
    parts = _twice(techniques.gradient_accumulation, situation.samples)
    return replace(techniques, gradient_accumulation=parts)


def checkpoint_blocks(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Compute every repeated block again in the backward pass."""
    if techniques.activation_checkpointing is True:
        return "every block is checkpointed already"
    return replace(techniques, activation_checkpointing=True)


def lighten_optimizer(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Say why not: the moments gathered so far would be lost."""
    return (
        "another optimizer would lose the state gathered so far; a new run can have "
        "optimizer=adafactor or adamw_8bit"
    )


def offload_activations(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Let what the backward pass needs wait in host memory."""
    if situation.device != "cuda":
        return f"a run on {situation.device} has its activations in host memory already"
    if techniques.saved_tensor_offload:
        return "saved tensors are offloaded already"
    return replace(techniques, saved_tensor_offload=True)


def offload_weights(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Let frozen weights wait in host memory while their block does not run."""
    if situation.device != "cuda":
        return f"a run on {situation.device} has its weights in host memory already"
    if techniques.weight_offload:
        return "frozen weights are offloaded already"
    if techniques.activation_checkpointing == "nested":
        return "memory.activation_checkpointing=nested runs parts of blocks alone"
    return replace(techniques, weight_offload=True)


def chunk_evaluation(techniques: Techniques, situation: Situation) -> Techniques | str:
    """Evaluate a batch in twice as many slices."""
    chunks = _twice(techniques.forward_chunks, situation.evaluated)
    if chunks <= techniques.forward_chunks:
        return "evaluation takes one sample at a time already"
    return replace(techniques, forward_chunks=chunks)


def _twice(parts: int, most: int | None) -> int:
    return 2 * parts if most is None else min(2 * parts, most)


LADDER = (
    Rung("fused_attention", fuse_attention),
    Rung("halve_micro_batch", halve_micro_batch),
    Rung("activation_checkpointing", checkpoint_blocks),
    Rung("lighter_optimizer", lighten_optimizer),
    Rung("saved_tensor_offload", offload_activations),
    Rung("weight_offload", offload_weights),
)
PLANNED_LADDER = (*LADDER, Rung("forward_chunks", chunk_evaluation))
"""Before a run: recovery makes evaluation smaller by itself, but a plan has to say so."""


def descend(
    techniques: Techniques,
    situation: Situation,
    predict: Predict = lambda techniques: None,
    refuse: Refuse = lambda techniques: None,
    ladder: Sequence[Rung] = LADDER,
    min_saving: float = MIN_SAVING,
    unknown: bool = True,
) -> Move:
    """Return the first rung that applies and is not predicted to be of no help.

    Args:
        techniques: those in force.
        situation: see `Situation`.
        predict: see `Predict`; without a prediction every rung that applies is worth a try.
        refuse: see `Refuse`.
        ladder: the rungs, in the order in which they are tried.
        min_saving: part of the peak that a rung must be predicted to save.
        unknown: whether a rung whose peak is not known is worth a try.

    """
    skipped: list[Skipped] = []
    now: int | None = None
    for rung in ladder:
        candidate = rung.change(techniques, situation)
        reason = candidate if isinstance(candidate, str) else refuse(candidate)
        if reason is None and isinstance(candidate, Techniques):
            now = predict(techniques) if now is None else now
            then = predict(candidate)
            if then is None:
                helps, reason = unknown, "its peak cannot be predicted"
            else:
                helps = now is None or then < (1 - min_saving) * now
                instead = "" if now is None else f" instead of {format_bytes(now)}"
                reason = f"predicted not to help: {format_bytes(then)}{instead}"
            if helps:
                return Move(rung.name, candidate, tuple(skipped))
        skipped.append(Skipped(rung.name, str(reason)))
    return Move(None, None, tuple(skipped))


def adapt(
    techniques: Techniques,
    samples: int,
    budget_bytes: int,
    predict: Predict,
    device: str = "cuda",
    refuse: Refuse = lambda techniques: None,
    ladder: Sequence[Rung] = LADDER,
    evaluated: int | None = None,
) -> tuple[Techniques | None, list[Move]]:
    """Go down until the predicted peak is inside the budget, before a run.

    Args:
        techniques: those asked for.
        samples: in the batch of a step.
        budget_bytes: what the peak must not exceed.
        predict: see `Predict`.
        device: type of the device.
        refuse: see `Refuse`.
        ladder: the rungs.
        evaluated: samples in a batch of evaluation; None: not known.

    Returns:
        the techniques that fit, None if none do or the peak is not known, and every move; of the
        last one that failed, `Move.skipped` says why nothing was left. A rung whose peak is not
        known is passed over.

    """
    moves: list[Move] = []
    now: Techniques = techniques
    while (peak := predict(now)) is not None and peak > budget_bytes:
        # Two phases may be about as high: a rung that lowers one of them shows little by itself.
        micro_batch = -(-samples // now.gradient_accumulation)
        situation = Situation(micro_batch, device, samples, evaluated)
        move = descend(now, situation, predict, refuse, ladder, 0.0, unknown=False)
        moves.append(move)
        if move.techniques is None:
            return None, moves
        now = move.techniques
    return (None if peak is None else now), moves


def changes(before: Techniques, after: Techniques) -> dict[str, Any]:
    """Return the settings that differ, with their new values."""
    return {name: value for name, value in vars(after).items() if vars(before)[name] != value}


MAX_RELEASES = 3
"""How often a step is taken again on the lowest rung: what lacked may have been somebody else's."""


class Apply(Protocol):
    """Puts techniques on a live model, in place, whatever it had before."""

    def __call__(self, model: nn.Module, techniques: Techniques, /) -> object:
        """Raise ConfigError where a technique finds nothing to apply to, changing nothing."""


class LadderState:
    """The techniques in force, and the way down.

    Args:
        techniques: those to begin with; `attach` takes a model that has them.
        device: the type of the device, ``cuda`` or ``cpu``.
        apply: see `Apply`; None: only the number of micro-batches can change.
        predict: peak in bytes with other techniques, to skip rungs that will not help.

    """

    def __init__(
        self,
        techniques: Techniques,
        device: str,
        apply: Apply | None = None,
        predict: Predict = lambda techniques: None,
    ) -> None:
        self.configured = self.techniques = techniques
        self.one_by_one = False
        self._device = device
        self._apply_to = apply
        self._predict = predict
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take charge of a model that has the techniques, and of its optimizer."""
        self._model, self._optimizer = model, optimizer

    def down(self, phase: str, samples: int, releases: int, whole_batch: bool = False) -> Move:
        """Go one rung down and return it; `Move.techniques` is None where nothing is left.

        Args:
            phase: in which memory ran out.
            samples: in the batch of the step.
            releases: how often releasing memory was all that was tried in this step.
            whole_batch: do not cut the batch into more parts.

        """
        skipped: list[Skipped] = []
        if phase == "optimizer_step":
            # No activations are alive then, and they are what the ladder saves.
            assert self._optimizer is not None
            reason = why_not(self._optimizer)
            if reason is None:
                self._step_one_by_one()
                return Move("one_by_one", self.techniques, ())
            skipped.append(Skipped("one_by_one", reason))
            if not releases:
                return Move("release", self.techniques, tuple(skipped))
        parts = min(self.techniques.gradient_accumulation, samples)
        situation = Situation(-(-samples // parts), self._device)
        before = self.techniques.gradient_accumulation

        def refuse(candidate: Techniques) -> str | None:
            if whole_batch and candidate.gradient_accumulation != before:
                return "the model normalises over the batch, and this is only a precaution"
            return self._refusal(candidate)

        move = descend(self.techniques, situation, self._predict, refuse)
        rung, techniques = move.rung, move.techniques
        if techniques is None and releases < MAX_RELEASES:
            rung, techniques = "release", self.techniques
        self.techniques = techniques or self.techniques
        self._apply(self.techniques)  # what was refused or not worth it may have been tried on
        return Move(rung, techniques, (*skipped, *move.skipped))

    def follow(self, move: Move) -> None:
        """Make the move that `down` returned in another process."""
        if move.techniques is None:
            return
        self.techniques = move.techniques
        self._apply(self.techniques)
        if move.rung == "one_by_one":
            self._step_one_by_one()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain values."""
        return {
            "configured": dict(vars(self.configured)),
            "techniques": dict(vars(self.techniques)),
            "one_by_one": self.one_by_one,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where a checkpoint stood, unless other techniques are configured since."""
        if techniques_from(state["configured"]) != self.configured:
            return
        self.techniques = techniques_from(state["techniques"])
        self._apply(self.techniques)
        if state["one_by_one"] and self._optimizer is not None and not self.one_by_one:
            self._step_one_by_one()

    def _refusal(self, candidate: Techniques) -> str | None:
        """Return why the model cannot have these techniques, by trying; None if it can."""
        if self._apply_to is None:
            ours = {**vars(self.techniques), "gradient_accumulation": None}
            if {**vars(candidate), "gradient_accumulation": None} != ours:
                return "no function was given that puts it on the model"
        try:
            self._apply(candidate)
        except ConfigError as error:
            return str(error)
        return None

    def _apply(self, techniques: Techniques) -> None:
        if self._apply_to is not None and self._model is not None:
            self._apply_to(self._model, techniques)

    def _step_one_by_one(self) -> None:
        assert self._optimizer is not None
        step_one_by_one(self._optimizer)
        self.one_by_one = True
