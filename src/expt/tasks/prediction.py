"""The peak with other techniques, predicted once each: what a descent and a recovery ask for."""

from __future__ import annotations

import logging

from expt.construction import Settings, build
from expt.errors import ConfigError, ExptError
from expt.foresight import plan_training
from expt.memory.planning.planning import Target
from expt.memory.techniques.techniques import Techniques
from expt.protocols import DataSet

log = logging.getLogger(__name__)


class Predictor:
    """Predicts once per set of techniques; `refused` says why there are none.

    Args:
        settings: the run's.
        data: on the host; None reads it again when it is needed, for a run whose data is on CUDA.
        target: the device to predict for.
        evaluation: also predict evaluation, which recovery makes smaller by itself.

    """

    def __init__(
        self, settings: Settings, data: DataSet | None, target: Target, evaluation: bool = True
    ) -> None:
        self._settings, self._data, self._target = settings, data, target
        self._evaluation = evaluation
        self._known: dict[Techniques, int | None] = {}
        self._refused: dict[Techniques, str] = {}

    def __call__(self, techniques: Techniques) -> int | None:
        """Return the predicted peak in bytes."""
        if not self._settings.memory.plan:
            return None
        if techniques not in self._known:
            try:
                if self._data is None:
                    self._data = build(self._settings, "data")
                found = plan_training(
                    self._settings,
                    self._data,
                    self._target,
                    techniques,
                    evaluation=self._evaluation,
                )
                # Without its activations a peak says nothing about what a technique saves.
                bounded = found.interval_bytes[1] is not None
                self._known[techniques] = found.demand_bytes if bounded else None
            except ConfigError as error:
                self._known[techniques] = None
                self._refused[techniques] = str(error)
            except (ExptError, RuntimeError, TypeError, ValueError, NotImplementedError):
                log.info("no prediction for %s", techniques, exc_info=True)
                self._known[techniques] = None
        return self._known[techniques]

    @property
    def least(self) -> int | None:
        """The lowest peak predicted so far, in bytes."""
        return min((peak for peak in self._known.values() if peak is not None), default=None)

    def refused(self, techniques: Techniques) -> str | None:
        """Return why the model cannot have these techniques, None if it can."""
        self(techniques)
        return self._refused.get(techniques)
