"""Node `expand`: which steps are tried from a preset, how long each, and what may be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class ExpandConfig:
    """Node of the task `expand`."""

    steps: list[str] = field(default_factory=list)  # one setting each, tried in this order
    probe_epochs: int | None = 2  # of each probe; None: trainer.epochs
    probe_steps: int | None = 300  # optimizer steps in an epoch; None: trainer.steps_per_epoch
    tolerance: float = 0.01  # by what part of the best validation error a step may be worse
    probe_time_limit_seconds: float | None = None  # after which a probe is ended, and not kept

    def problems(self) -> list[str]:
        """Return one message per value out of range."""
        found = [
            f"expand.{name} must be at least 1, got {value}"
            for name in ("probe_epochs", "probe_steps")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            found.append(
                f"expand.tolerance must not be negative, got {self.tolerance}; 0.01 keeps a step "
                "whose validation error is at most 1 % above the best one's"
            )
        limit = self.probe_time_limit_seconds
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            found.append(
                f"expand.probe_time_limit_seconds must be a positive number or null, got {limit}"
            )
        return found
