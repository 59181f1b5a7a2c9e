"""Which settings mattered for the metric: Optuna's PED-ANOVA over a study's trials, or over runs.

Source: Watanabe, Bansal and Hutter, PED-ANOVA, IJCAI 2023 (arXiv:2304.10255).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.job import Metric
from expt.reports.figures.style import BLUE, INK, draw
from expt.reports.records import RunRecord, RunSet, short_names, varied

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_RUNS = 10
"""Finished runs below which nothing is said: the best tenth would be less than one run."""


@dataclass(frozen=True)
class Importance:
    """Shares by setting, largest first, adding up to 1; without any, `reason` says why not."""

    shares: Mapping[str, float]
    runs: int
    reason: str = ""


def importance(runs: RunSet) -> Importance:
    """Return what each setting had to do with getting among the best runs."""
    done = [record for record in runs.records if record.value is not None]
    if runs.space:
        done = [record for record in done if record.trial is not None]
    if len(done) < LEAST_RUNS:
        return Importance({}, len(done), f"it takes {LEAST_RUNS} finished runs; {len(done)} are")
    values, space = _from_study(runs, done) if runs.space else _from_settings(done)
    space = {name: one for name, one in space.items() if not one.single()}
    if len(space) < 2:
        what = "no setting differs" if not space else f"only {next(iter(space))} differs"
        return Importance({}, len(done), f"{what} between the runs; it takes two")
    figures = [record.value for record in done if record.value is not None]
    shares = _shares(values, figures, space, runs.metric)
    if not shares:
        return Importance({}, len(done), "the best runs are no different from the others")
    return Importance(shares, len(done))


def plot_importance(found: Importance, folder: Path) -> list[Path]:
    """Draw a bar per setting; return the files, none where there is nothing to say."""
    if not found.shares:
        return []
    names, shares = list(short_names(found.shares).values()), list(found.shares.values())

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(names, shares, color=BLUE, height=0.62)
        axes.invert_yaxis()
        for place, share in enumerate(shares):
            text = f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
            axes.annotate(
                text, (share, place), textcoords="offset points", xytext=(4, 0), va="center",
                fontsize=8, color=INK,
            )  # fmt: skip
        axes.set_xlim(0, 1.12 * max(shares))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.set_xlabel("share of what sets the best tenth of the runs apart")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    return draw(folder, "importance", 0.9 + 0.27 * len(names), onto)


def _from_study(
    runs: RunSet, done: Sequence[RunRecord]
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    rows = [
        runs.parameters.get(record.trial if record.trial is not None else -1, {}) for record in done
    ]
    return rows, {name: one for name, one in runs.space.items() if any(name in row for row in rows)}


def _from_settings(
    done: Sequence[RunRecord],
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Return the settings that differ, as numbers where all are, and distributions around them."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    names = [name for name in varied(done) if all(name in record.settings for record in done)]
    space: dict[str, BaseDistribution] = {}
    rows: list[dict[str, Any]] = [{} for _ in done]
    for name in names:
        texts = [record.settings[name] for record in done]
        numbers = [_number(text) for text in texts]
        if all(number is not None for number in numbers):
            known = [number for number in numbers if number is not None]
            log = min(known) > 0 and max(known) > 100 * min(known)
            space[name] = FloatDistribution(min(known), max(known), log=log)
            column: Sequence[Any] = known
        else:
            space[name] = CategoricalDistribution(sorted(set(texts)))
            column = texts
        for row, value in zip(rows, column, strict=True):
            row[name] = value
    return list(rows), dict(space)


def _shares(
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[float],
    space: Mapping[str, Any],
    metric: Metric,
) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.study import StudyDirection

    shown = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction=StudyDirection[metric.direction.upper()])
        study.add_trials(
            [
                optuna.create_trial(
                    value=figure,
                    params={name: row[name] for name in space if name in row},
                    distributions={name: space[name] for name in space if name in row},
                )
                for row, figure in zip(rows, figures, strict=True)
            ]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about few trials, which the page says itself
            # Without a scale of their own the shares of nothing would come out all equal.
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), normalize=False
            )
    finally:
        optuna.logging.set_verbosity(shown)
    whole = sum(found.values())
    if not (math.isfinite(whole) and whole > 0):
        return {}
    return {name: share / whole for name, share in found.items()}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
