"""Which metric a search compares its trials by, and where it learns that.

`expt.search.candidates.learn_data` asks the data set before the first trial, or looks into the
``result.json`` of a trial that was trained before. From then on the study keeps it, for whoever
reads the study later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optuna.study import Study

from expt.config.search_node import VALIDATION
from expt.errors import ConfigError
from expt.job import Metric
from expt.result import FILE_NAME, load_result

ATTRIBUTE = "expt.metric"
EARLIER = Metric("mae")
"""What all searches compared before data sets declared metrics."""


def metric_of(study: Study) -> Metric:
    """Return the metric that a study was begun with."""
    known = study.user_attrs.get(ATTRIBUTE)
    return EARLIER if known is None else Metric.from_dict(known)


def metric_of_trials(folder: Path) -> Metric | None:
    """Return the metric that the trials in a search's folder monitored, None without a result."""
    found = (load_result(path.parent) for path in sorted(folder.glob(f"trial_*/**/{FILE_NAME}")))
    return next((result.metric() for result in found if result is not None), None)


def objectives_of(names: Sequence[str], metric: Metric) -> list[str]:
    """Return `search.objectives` with the metric by its own name: ``val`` is ``val/accuracy``.

    Raises:
        ConfigError: they name a metric that is not monitored.

    """
    own = f"{VALIDATION}/{metric.name}"
    if names[0] not in (VALIDATION, own):
        raise ConfigError(
            f"search.objectives={list(names)}: trials are compared by the metric that they "
            f"monitor, which is {own}; give trainer.monitor={names[0].rpartition('/')[2]} too, or "
            "leave search.objectives out"
        )
    return [own, *names[1:]]


def mismatch(found: Metric, wanted: Metric) -> str | None:
    """Return why a trial that monitored `found` cannot be compared in a search by `wanted`."""
    if (found.name, found.goal) == (wanted.name, wanted.goal):
        return None
    return (
        f"it monitors {found.name} ({found.goal}), and the search compares {wanted.name} "
        f"({wanted.goal})"
    )
