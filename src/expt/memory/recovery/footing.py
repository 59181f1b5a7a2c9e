"""Where a run stands on the ladder: the techniques in force on its model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from expt.errors import ConfigError
from expt.memory.recovery.ladder import Move, Predict, Situation, Skipped, descend
from expt.memory.recovery.one_by_one import step_one_by_one, why_not
from expt.memory.recovery.oom_event import techniques_from
from expt.memory.techniques.techniques import Techniques

MAX_RELEASES = 3
"""How often a step is taken again on the lowest rung: what lacked may have been somebody else's."""


class Apply(Protocol):
    """Puts techniques on a live model, in place, whatever it had before."""

    def __call__(self, model: nn.Module, techniques: Techniques, /) -> object:
        """Raise ConfigError where a technique finds nothing to apply to, changing nothing."""


class Footing:
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

    def down(self, phase: str, samples: int, releases: int) -> Move:
        """Go one rung down and return it; `Move.techniques` is None where nothing is left.

        Args:
            phase: in which memory ran out.
            samples: in the batch of the step.
            releases: how often releasing memory was all that was tried in this step.

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
        move = descend(self.techniques, situation, self._predict, self._refusal)
        rung, techniques = move.rung, move.techniques
        if techniques is None and releases < MAX_RELEASES:
            rung, techniques = "release", self.techniques
        self.techniques = techniques or self.techniques
        self._apply(self.techniques)  # what was refused or not worth it may have been tried on
        return Move(rung, techniques, (*skipped, *move.skipped))

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
