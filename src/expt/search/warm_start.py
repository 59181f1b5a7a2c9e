"""`search.warm_start`: what earlier studies found, shown to the sampler of a new one.

A finished trial of an earlier study becomes a trial of the new one that was never started here:
the sampler and the pruner see it, and it is none of `search.n_trials`, no duplicate, and never the
best. Its excess over the budget is that of the new budget. Where the earlier study trained with
other settings than the new one, beside what is varied (longer, say), its figures do not compare:
the sampler is not shown them, and only its best points inside the new budget are tried first. The
same holds for a sampler that learns from no trial but those that it suggested itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import GPSampler, GridSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from expt.config.compose import key
from expt.config.schema import OnOverflow
from expt.config.search_node import PEAK
from expt.errors import ConfigError, nearest
from expt.job import Metric
from expt.result import Outcome, RunResult, load_result
from expt.search.metric import metric_of, mismatch
from expt.search.request import (
    BATCHES,
    CHANGES_PEAKS,
    ON_OVERFLOW,
    SEVERAL,
    is_interpolation,
    resolved,
)
from expt.search.space import Space, same, typed
from expt.search.stored import StudyError, load
from expt.search.study import DATA, PREFIX, absolute_storage, changed_settings
from expt.search.trial import (
    CONSTRAINT,
    FROM,
    FROM_KIND,
    PREDICTED,
    TECHNIQUES,
    kind_of,
    may_go_well,
)
from expt.search.winner import FILE_NAME, SweepSummary
from expt.units import GIB
from expt.uri import HIDDEN, without_password

SHOWN = f"{PREFIX}warm_start"
"""Attribute of a study: the earlier studies that it was given, by `identity_of`."""
RESOLVED = f"{PREFIX}resolved"
"""Attribute of a study: what `expt.search.request.resolved_settings` returned."""
MOST_FIRST = 3
"""Points of a study whose trials the sampler is not shown, that are tried first."""
OUTSIDE, WITHOUT_FIGURES = "outside of the space", "without figures"
NOT_RECORDED = ["its settings, which were not recorded"]
READS_ADDED = (TPESampler, GPSampler)
"""Samplers that learn from trials that were added to a study; the others keep books of their own,
on what they suggested themselves, or learn nothing."""


@dataclass
class Earlier:
    """What of one earlier study is of use to a new one.

    `shown` are trials for the sampler, `first` points to be tried first, `left_out` how many
    trials are neither, by reason; `changed` the settings that differ, so that nothing is shown;
    `reads` says whether the sampler learns from trials that it did not suggest.
    """

    study: str
    identity: str
    shown: list[FrozenTrial] = field(default_factory=list)
    first: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Sequence[str] = ()
    reads: bool = True

    def words(self) -> str:
        """Return one line about it."""
        knows = f"the sampler knows {len(self.shown)} of its trials"
        if not self.reads:
            knows = "this sampler learns from no trials but its own"
        text = f"warm start from {self.study}: {knows}; tried first: {len(self.first)}"
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
        storage: where it is kept, as it was given.
        space: what is varied.
        fixed: the other settings, by `expt.search.request.resolved_settings`.
        metric: that trials are compared by.
        objectives: of the study.
        budget_bytes: the limit, None without one.
        data: the fingerprint of the data that trials share, None where it is not known.
        repeats: how many seeds a figure is the mean of.

    """

    study: str
    storage: str
    space: Space
    fixed: Mapping[str, Any]
    metric: Metric
    objectives: Sequence[str]
    budget_bytes: int | None = None
    data: str | None = None
    repeats: int = 1

    @property
    def adapts(self) -> bool:
        """Whether trials are given techniques that make them fit."""
        return bool(self.fixed.get(ON_OVERFLOW) == OnOverflow.adapt.name)


@dataclass(frozen=True)
class Source:
    """An earlier study that is open, and what tells it from all others, by `identity_of`."""

    study: Study
    identity: str


def identity_of(storage: str, study: str) -> str:
    """Return what tells a study from any other of its name: where it is kept, and its name."""
    return f"{without_password(absolute_storage(storage)).replace(f':{HIDDEN}@', '@')} {study}"


def open_earlier(name: str, storage: BaseStorage, task: Task) -> Source:
    """Open a study by its name in the storage of the new one, or by the folder of its search.

    Raises:
        ConfigError: there is none, or it is the same study, compared another metric, or was on
            other data.

    """
    found = _opened(name, storage, task)
    problem = _problem(found, task)
    if problem is not None:
        raise ConfigError(f"search.warm_start={name}: {problem}")
    return found


def _opened(name: str, storage: BaseStorage, task: Task) -> Source:
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        return Source(study, identity_of(task.storage, name))
    except KeyError:
        pass
    for folder in (Path(name), Path("outputs/sweeps") / name):
        summary = SweepSummary.load(folder) if (folder / FILE_NAME).exists() else None
        if summary is not None and summary.storage is not None:
            try:
                return Source(load(summary), identity_of(summary.storage, summary.study))
            except StudyError as error:
                raise ConfigError(f"search.warm_start={name}: {error}") from error
    known = optuna.get_all_study_names(storage)
    raise ConfigError(
        f"search.warm_start={name}: there is no such study in search.storage, and no search's "
        f"folder of this name; {nearest(name, known) if known else 'the storage holds none'}"
    )


def look_back(source: Source, task: Task, reads: bool = True) -> Earlier:
    """Return what of an earlier study a new one can use.

    Args:
        source: the earlier study.
        task: of the new one.
        reads: whether the new one's sampler learns from trials that it did not suggest.

    """
    earlier = source.study
    then = settings_of(earlier)
    changed = _changed(then, earlier, task)
    found = Earlier(earlier.study_name, source.identity, changed=changed, reads=reads)
    usable: list[tuple[FrozenTrial, dict[str, Any]]] = []
    for trial in earlier.get_trials(deepcopy=False):
        kind = kind_of(trial)
        if kind is None or kind is Outcome.duplicate or not trial.state.is_finished():
            continue
        point = point_of(trial, then, task)
        if point is None:
            found.left_out[OUTSIDE] += 1
            continue
        shown = _shown(trial, kind, point, source, task)
        if shown is None:
            found.left_out[WITHOUT_FIGURES] += 1
            continue
        if shown.state is TrialState.COMPLETE and shown.constraints.get(CONSTRAINT, 0.0) <= 0:
            usable.append((shown, point))
        if found.changed:
            found.left_out["with other settings"] += 1
        elif reads:
            found.shown.append(shown)
    usable.sort(key=lambda pair: task.metric.cost(pair[0].values[0]))
    # The winner is to be a run of this search, so that the best is trained here in any case.
    count = MOST_FIRST if found.changed or not reads else 1
    found.first = [point for _, point in usable[:count]]
    if found.changed:
        found.left_out["with other settings"] -= len(found.first)
    found.left_out = +found.left_out
    return found


def begin_warm(study: Study, task: Task, earlier: Sequence[Source]) -> list[str]:
    """Give a study what earlier ones have, those that it was not given yet; say what, by study.

    To be called under the folder's lock, before other points are put first. A grid, which tries
    every point in any case, is given nothing.
    """
    if not earlier:
        return []
    if isinstance(study.sampler, GridSampler):
        return ["warm start: a grid tries every point, so that it needs nothing of earlier studies"]
    known = list(study.user_attrs.get(SHOWN, []))
    reads = isinstance(study.sampler, READS_ADDED)
    # Earlier versions wrote down names alone.
    new = [one for one in earlier if not {one.identity, one.study.study_name} & set(known)]
    found = [look_back(one, task, reads) for one in new]
    # Of a start that was killed on the way.
    have = {trial.user_attrs.get(FROM) for trial in study.get_trials(deepcopy=False)}
    for one in found:
        study.add_trials([trial for trial in one.shown if trial.user_attrs[FROM] not in have])
        for point in one.first:
            put_first(study, point)
        known.append(one.identity)
        study.set_user_attr(SHOWN, known)
    lines = [one.words() for one in found]
    shown = sum(len(one.shown) for one in found)
    startup = getattr(study.sampler, "_n_startup_trials", 0)
    if reads and 0 < shown < startup:
        lines.append(
            f"warm start: {shown} trials are fewer than {startup} "
            "(hydra.sweeper.sampler.n_startup_trials), up to which points are drawn at random"
        )
    return lines


def put_first(
    study: Study, point: dict[str, Any], unless_failed: bool = False, **attributes: Any
) -> None:
    """Let a point be tried next, unless the study has it; what it was shown was not tried here.

    Its trial is given the attributes, also if it waits to be tried already. With `unless_failed`,
    what failed and may not the next time does not count as tried.
    """
    for trial in study.get_trials(deepcopy=False):
        tried = trial.system_attrs.get("fixed_params", trial.params)
        if unless_failed and may_go_well(trial):
            continue
        if FROM not in trial.user_attrs and same(tried, point):
            if not trial.state.is_finished():
                for name, value in attributes.items():
                    study._storage.set_trial_user_attr(trial._trial_id, name, value)
            return
    study.enqueue_trial(point, user_attrs=attributes)


def record_settings(study: Study, task: Task) -> None:
    """Write down the settings by which a later study compares its own with this one.

    One of `CHANGES_PEAKS` that a restart or another worker gives another value becomes `SEVERAL`.
    """
    known = study.user_attrs.get(RESOLVED)
    if known is None:
        if study.get_trials(deepcopy=False):
            return  # it is of an earlier version, and what it was begun with is not known
        study.set_user_attr(RESOLVED, dict(task.fixed))
        return
    others = [name for name in CHANGES_PEAKS & known.keys() if known[name] != task.fixed.get(name)]
    mixed = {**known, **dict.fromkeys(others, SEVERAL)}
    if mixed != known:
        study.set_user_attr(RESOLVED, mixed)


def settings_of(study: Study) -> dict[str, Any]:
    """Return the settings that a study's trials shared, interpolations as far as they have values.

    Of a study of an earlier version the device is that of its trials, "" if none says it.
    """
    known = study.user_attrs.get(RESOLVED)
    if known is not None:
        return dict(known)
    written = study.user_attrs.get(f"{PREFIX}setting")
    if not written:
        return {}
    device = next((result.device for result in _results(study) if result.device), "")
    return {**resolved(written), "trainer.device": device.partition(" ")[0]}


def _problem(source: Source, task: Task) -> str | None:
    """Say why a study is of no use at all."""
    earlier = source.study
    if source.identity == identity_of(task.storage, task.study):
        return "this is the study itself, which goes on from its own trials anyway"
    metric = metric_of(earlier)
    if (other := mismatch(metric, task.metric)) is not None:
        return other.replace("it monitors", "it compared").replace("the search", "this search")
    data = data_of(earlier)
    if None not in (task.data, data) and data != task.data:
        return f"its data are others (fingerprint {data}, and here {task.data})"
    return None


def data_of(study: Study) -> str | None:
    """Return the fingerprint of a study's data; None where they are varied, or it is not known."""
    if (known := study.user_attrs.get(DATA)) is not None:
        return str(known)
    trials = study.get_trials(deepcopy=False)
    varied = {key(name) for trial in trials for name in trial.params} - BATCHES
    if any(name.partition(".")[0] == "data" for name in varied):
        return None
    known = (result.data_fingerprint for result in _results(study))
    return next((mark for mark in known if mark is not None), None)


def _results(study: Study) -> Iterator[RunResult]:
    """Yield the results of a study's trials, those that are still in their folders."""
    for trial in study.get_trials(deepcopy=False):
        folder = trial.user_attrs.get("run_dir")
        result = load_result(Path(folder)) if folder else None
        if result is not None:
            yield result


def point_of(
    trial: FrozenTrial, fixed_then: Mapping[str, Any], task: Task
) -> dict[str, Any] | None:
    """Return the point of the new space that a trial was, None if it is outside.

    What is varied now and was fixed then has the value of then; what was varied then and is fixed
    now has to have had the value of now.
    """
    own = {key(name): typed(value) for name, value in trial.params.items()}
    then = {**fixed_then, **trial.user_attrs.get(TECHNIQUES, {}), **own}
    names = {key(name): name for name in task.space.distributions}
    point = task.space.point({name: then[bare] for bare, name in names.items() if bare in then})
    if len(point) < len(names):
        return None
    for bare in own.keys() - names:
        now = task.fixed.get(bare)
        # One whose value is not known now says nothing.
        if bare not in task.fixed or not (same(now, own[bare]) or is_interpolation(now)):
            return None
    return point


def _changed(then: Mapping[str, Any], earlier: Study, task: Task) -> list[str]:
    """Return the settings, beside what is varied, in which the two studies differ."""
    if not then:
        return NOT_RECORDED
    varied = {key(name) for name in task.space.distributions}
    varied |= {key(name) for name in earlier.user_attrs.get(f"{PREFIX}space", {})}
    found = [
        name
        for name in changed_settings(then, task.fixed)
        if name not in varied
        # One whose value is not known says nothing.
        and not is_interpolation(then.get(name))
        and not is_interpolation(task.fixed.get(name))
    ]
    if earlier.user_attrs.get(f"{PREFIX}repeats", 1) != task.repeats:
        found.append("search.repeats")
    return found


def _shown(
    trial: FrozenTrial, kind: Outcome, point: dict[str, Any], source: Source, task: Task
) -> FrozenTrial | None:
    """Return a trial as the new study is shown it, None if nothing is known of it there."""
    excess = _excess(trial, kind, task.budget_bytes)
    if excess is not None and task.adapts and kind is not Outcome.predicted_over:
        # It is given the techniques that the new budget asks for; only what the least of them
        # were not enough for has a demand that says something here.
        excess = min(excess, 0.0)
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
            FROM: f"{source.identity} {trial.number}",
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
