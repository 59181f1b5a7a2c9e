"""`search.warm_start`: what earlier studies found, shown to the sampler of a new one.

A finished trial of an earlier study becomes a trial of the new one that was never started here:
the sampler and the pruner see it, and it is none of `search.n_trials`, no duplicate, and never the
best. Its excess over the budget is that of the new budget. Where the earlier study trained with
other settings than the new one, beside what is varied (longer, say), its figures do not compare:
the sampler is not shown them, and only its best points inside the new budget are tried first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from expt.config.compose import key
from expt.config.search_node import PEAK
from expt.errors import ConfigError, nearest
from expt.job import Metric
from expt.result import Outcome, load_result
from expt.search.metric import metric_of, mismatch
from expt.search.request import MAY_DIFFER
from expt.search.space import Space, typed
from expt.search.study import PREFIX, changed_settings, open_storage
from expt.search.trial import CONSTRAINT, FROM, FROM_KIND, PREDICTED, kind_of
from expt.search.winner import FILE_NAME, SweepSummary
from expt.units import GIB

SHOWN = f"{PREFIX}warm_start"
"""Attribute of a study: the earlier studies that it was given."""
MOST_FIRST = 3
"""Points of a study whose figures do not compare, that are tried first."""
OUTSIDE, WITHOUT_FIGURES = "outside of the space", "without figures"


@dataclass
class Earlier:
    """What of one earlier study is of use to a new one.

    `shown` are trials for the sampler, `first` points to be tried first, `left_out` how many
    trials are neither, by reason; `changed` the settings that differ, so that nothing is shown.
    """

    study: str
    shown: list[FrozenTrial] = field(default_factory=list)
    first: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Sequence[str] = ()

    def words(self) -> str:
        """Return one line about it."""
        text = f"warm start from {self.study}: the sampler knows {len(self.shown)} of its trials; "
        text += f"tried first: {len(self.first)}"
        if self.left_out:
            reasons = ", ".join(f"{count} {why}" for why, count in self.left_out.most_common())
            text += f"; left out: {reasons}"
        if self.changed:
            few = ", ".join(self.changed[:3]) + (", …" if self.changed[3:] else "")
            text += f"; its figures do not compare, since these differ: {few}"
        return text


@dataclass(frozen=True)
class Task:
    """What a new study looks for, as far as earlier ones have to agree with it.

    Args:
        study: its name.
        space: what is varied.
        fixed: the other settings, by `expt.search.request.fixed_settings`.
        metric: that trials are compared by.
        objectives: of the study.
        budget_bytes: the limit, None without one.
        data: the fingerprint of the data, None where it is not known.

    """

    study: str
    space: Space
    fixed: Mapping[str, Any]
    metric: Metric
    objectives: Sequence[str]
    budget_bytes: int | None = None
    data: str | None = None

    @property
    def varies_data(self) -> bool:
        """Whether trials have different data."""
        return any(key(name).partition(".")[0] == "data" for name in self.space.distributions)


def open_earlier(name: str, storage: BaseStorage, task: Task) -> Study:
    """Open a study by its name in the storage of the new one, or by the folder of its search.

    Raises:
        ConfigError: there is none, or it is the same study, compared another metric, or was on
            other data.

    """
    found = _opened(name, storage)
    problem = _problem(found, task)
    if problem is not None:
        raise ConfigError(f"search.warm_start={name}: {problem}")
    return found


def _opened(name: str, storage: BaseStorage) -> Study:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        pass
    for folder in (Path(name), Path("outputs/sweeps") / name):
        summary = SweepSummary.load(folder) if (folder / FILE_NAME).exists() else None
        if summary is not None and summary.storage is not None:
            with suppress(KeyError):
                own = open_storage(summary.storage)
                return optuna.load_study(study_name=summary.study, storage=own)
    known = optuna.get_all_study_names(storage)
    raise ConfigError(
        f"search.warm_start={name}: there is no such study in search.storage, and no search's "
        f"folder of this name; {nearest(name, known) if known else 'the storage holds none'}"
    )


def look_back(earlier: Study, task: Task) -> Earlier:
    """Return what of an earlier study a new one can use."""
    then = dict(earlier.user_attrs.get(f"{PREFIX}setting") or {})
    found = Earlier(earlier.study_name, changed=_changed(then, earlier, task))
    usable: list[tuple[FrozenTrial, dict[str, Any]]] = []
    for trial in earlier.get_trials(deepcopy=False):
        kind = kind_of(trial)
        if kind is None or kind is Outcome.duplicate or not trial.state.is_finished():
            continue
        point = point_of(trial, then, task)
        if point is None:
            found.left_out[OUTSIDE] += 1
            continue
        shown = _shown(trial, kind, point, earlier, task)
        if shown is None:
            found.left_out[WITHOUT_FIGURES] += 1
            continue
        if shown.state is TrialState.COMPLETE and shown.constraints.get(CONSTRAINT, 0.0) <= 0:
            usable.append((shown, point))
        if found.changed:
            found.left_out["with other settings"] += 1
        else:
            found.shown.append(shown)
    usable.sort(key=lambda pair: task.metric.cost(pair[0].values[0]))
    # The winner is to be a run of this search, so that the best is trained here in any case.
    count = MOST_FIRST if found.changed else 1
    found.first = [point for _, point in usable[:count]]
    if found.changed:
        found.left_out["with other settings"] -= len(found.first)
    found.left_out = +found.left_out
    return found


def begin_warm(study: Study, task: Task, earlier: Sequence[Study]) -> list[str]:
    """Give a study what earlier ones have, those that it was not given yet; say what, by study.

    To be called under the folder's lock, before other points are put first.
    """
    known = list(study.user_attrs.get(SHOWN, []))
    found = [look_back(one, task) for one in earlier if one.study_name not in known]
    for one in found:
        study.add_trials(one.shown)
        for point in one.first:
            study.enqueue_trial(point)
        known.append(one.study)
        study.set_user_attr(SHOWN, known)
    return [one.words() for one in found]


def _problem(earlier: Study, task: Task) -> str | None:
    """Say why a study is of no use at all."""
    if earlier.study_name == task.study:
        return "this is the study itself, which goes on from its own trials anyway"
    metric = metric_of(earlier)
    if (other := mismatch(metric, task.metric)) is not None:
        return other.replace("it monitors", "it compared").replace("the search", "this search")
    data = data_of(earlier)
    if task.data is not None and data is not None and not task.varies_data and data != task.data:
        return f"its data are others (fingerprint {data}, and here {task.data})"
    return None


def data_of(study: Study) -> str | None:
    """Return the fingerprint of a study's data; None where they are varied, or it is not known."""
    trials = study.get_trials(deepcopy=False)
    if any(key(name).partition(".")[0] == "data" for trial in trials for name in trial.params):
        return None
    folders = (trial.user_attrs.get("run_dir") for trial in trials)
    results = (load_result(Path(folder)) for folder in folders if folder)
    known = (result.data_fingerprint for result in results if result is not None)
    return next((mark for mark in known if mark is not None), None)


def point_of(
    trial: FrozenTrial, fixed_then: Mapping[str, Any], task: Task
) -> dict[str, Any] | None:
    """Return the point of the new space that a trial was, None if it is outside.

    What is varied now and was fixed then has the value of then; what was varied then and is fixed
    now has to have had the value of now.
    """
    own = {key(name): typed(value) for name, value in trial.params.items()}
    then = {**fixed_then, **own}
    names = {key(name): name for name in task.space.distributions}
    point = task.space.point({name: then[bare] for bare, name in names.items() if bare in then})
    if len(point) < len(names):
        return None
    elsewhere = {bare: value for bare, value in own.items() if bare not in names}
    if any(bare not in task.fixed or task.fixed[bare] != elsewhere[bare] for bare in elsewhere):
        return None
    return point


def _changed(then: Mapping[str, Any], earlier: Study, task: Task) -> list[str]:
    """Return the settings, beside what is varied, in which the two studies differ."""
    if not then:
        return ["its settings, which were not recorded"]
    varied = {key(name) for name in task.space.distributions}
    for trial in earlier.get_trials(deepcopy=False)[:1]:
        varied |= {key(name) for name in trial.params}
    differing = changed_settings(then, task.fixed)
    return [name for name in differing if name not in varied and name not in MAY_DIFFER]


def _shown(
    trial: FrozenTrial, kind: Outcome, point: dict[str, Any], earlier: Study, task: Task
) -> FrozenTrial | None:
    """Return a trial as the new study is shown it, None if nothing is known of it there."""
    excess = _excess(trial, kind, task.budget_bytes)
    over = excess is not None and excess > 0
    state, values = trial.state, None
    if state is TrialState.COMPLETE:
        values = [trial.values[0]]
        if PEAK in task.objectives:
            peak = trial.user_attrs.get("peak_bytes")
            if peak is None:
                return None
            values.append(float(peak))
        if task.budget_bytes is not None and excess is None:
            return None
    elif state is not TrialState.PRUNED:
        return None
    elif kind.columns.over and not over:
        return None  # that it did not fit then says nothing now
    constraints = None if excess is None else {CONSTRAINT: excess}
    known = ("peak_bytes", "demand_bytes", PREDICTED, "interval_bytes", "seconds")
    attributes = {name: trial.user_attrs[name] for name in known if name in trial.user_attrs}
    return create_trial(
        state=state,
        values=values,
        params=point,
        distributions=dict(task.space.distributions),
        user_attrs={
            **attributes,
            FROM: f"{earlier.study_name} {trial.number}",
            FROM_KIND: kind.value,
        },
        intermediate_values=trial.intermediate_values if len(task.objectives) == 1 else {},
        constraints=constraints,
    )


def _excess(trial: FrozenTrial, kind: Outcome, budget_bytes: int | None) -> float | None:
    """Return by how many GiB a trial exceeds the new budget, None where that is not known."""
    if budget_bytes is None:
        return None
    attributes = trial.user_attrs
    demand = None if kind is Outcome.out_of_memory else attributes.get("demand_bytes")
    if demand is None and CONSTRAINT in trial.constraints and "budget_bytes" in attributes:
        demand = attributes["budget_bytes"] + round(trial.constraints[CONSTRAINT] * GIB)
    return None if demand is None else (demand - budget_bytes) / GIB
