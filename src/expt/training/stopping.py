"""Why a run ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from expt.config.schema import TrainerConfig
from expt.result import Status
from expt.training.checkpoint import Progress

StopReason = Literal[
    "epochs",
    "max_steps",
    "time_limit",
    "early_stopping",
    "signal",
    "non_finite_loss",
    "out_of_memory",
]
STATUSES: dict[StopReason, Status] = {
    "signal": "stopped",
    "non_finite_loss": "failed",
    "out_of_memory": "failed",
}
"""How a run counts that ended for a reason; completed, if it is none of these."""


@dataclass(frozen=True)
class Ending:
    """Why `fit` returned; `step` is the optimizer step at which it did."""

    status: Status
    reason: StopReason
    step: int
    message: str | None = None

    @classmethod
    def of(cls, reason: StopReason, step: int, message: str | None = None) -> Ending:
        """Return the ending that a reason means."""
        return cls(STATUSES.get(reason, "completed"), reason, step, message)


def limit_reached(
    progress: Progress, settings: TrainerConfig, before_validation: bool = False
) -> StopReason | None:
    """Return which limit is reached; early stopping is judged after validations only."""
    if settings.max_steps is not None and progress.step >= settings.max_steps:
        return "max_steps"
    if progress.seconds >= (settings.time_limit_seconds or math.inf):
        return "time_limit"
    if before_validation:
        return None
    if progress.epoch >= settings.epochs:
        return "epochs"
    patience = settings.early_stopping_patience
    # A stage that no longer improves is not the end of those after it.
    since = max([progress.best_epoch, *(stage.first_epoch for stage in settings.stages)])
    if patience is not None and progress.epoch - since >= patience:
        return "early_stopping"
    return None
