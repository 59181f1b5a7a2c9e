"""When a run ends by itself."""

from __future__ import annotations

import pytest

from expt.config.schema import TrainerConfig
from expt.training.checkpoint import Progress
from expt.training.stopping import limit_reached


@pytest.mark.parametrize(
    ("epoch", "best_epoch", "reason"),
    [(2, 1, None), (3, 1, "early_stopping"), (3, 2, None), (9, 9, "epochs")],
)
def test_patience_counts_from_the_best_epoch(epoch, best_epoch, reason) -> None:
    settings = TrainerConfig(epochs=9, early_stopping_patience=2)
    progress = Progress(epoch=epoch, best_epoch=best_epoch)
    assert limit_reached(progress, settings) == reason
    assert reason == "epochs" or limit_reached(progress, settings, before_validation=True) is None


@pytest.mark.parametrize(
    ("epoch", "reason"), [(4, None), (5, None), (6, None), (7, "early_stopping")]
)
def test_a_stage_that_no_longer_improves_does_not_end_those_after_it(epoch, reason) -> None:
    settings = TrainerConfig(
        epochs=9, early_stopping_patience=2, trainable={0: ["head.*"], 5: ["*"]}
    )
    assert limit_reached(Progress(epoch=epoch, best_epoch=1), settings) == reason
