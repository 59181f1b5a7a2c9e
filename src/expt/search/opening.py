"""Opens the study of a search: as its first worker, with what is to be tried first, or as another.

What is tried first are the best points of earlier studies (`search.warm_start`), what presets give
to the space (`search.presets`), and the points of `search.enqueue`. The study of a retraining is
opened before its search begins, so that a mistake is known then, and given its points after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.study import Study

from expt.errors import ConfigError, UserError
from expt.job import Metric
from expt.run.process import WorkerError
from expt.search.candidates import TrialJobs, preset_values
from expt.search.request import Request, fixed_settings, given_points, resolved_settings
from expt.search.reservation import Reservations
from expt.search.samplers import make_pruner, make_sampler, seed_of
from expt.search.space import Space
from expt.search.study import DATA, TOKEN_NAME, answering, claim, open_study
from expt.search.trial import PRESET
from expt.search.warm_start import (
    Task,
    begin_warm,
    data_of,
    open_earlier,
    put_first,
    record_settings,
)
from expt.units import format_bytes

BUDGET_BYTES = "expt.budget_bytes"
ENQUEUED, WORKERS = "expt.enqueued", "expt.workers"
"""Attributes of a study: that its presets were put first; how many workers it has had."""


def open_search(
    request: Request,
    space: Space,
    storage: BaseStorage,
    sampler: BaseSampler,
    jobs: TrialJobs,
    metric: Metric,
    data: str | None,
    where: str,
    device: str,
    available: int | None = None,
    given_only: bool = False,
) -> Reservations:
    """Open the study, and put first what is to be tried first.

    Args:
        request: the search.
        space: what it varies.
        storage: of the study.
        sampler: of its first worker.
        jobs: its trials.
        metric: that they are compared by.
        data: the fingerprint of the data that they share, None where it is not known.
        where: `storage` as it was given.
        device: the kind that trials run on, as far as they share one.
        available: the memory of the device that trials run on; None where another machine has it.
        given_only: whether it is a retraining, which gets its points by `put_points`.

    Raises:
        ConfigError: it is another search, or begun with other data or more memory than is available
            here; or a point, preset or earlier study is not what it should be, and no study is left
            behind.

    """
    node = request.config
    request.folder.mkdir(parents=True, exist_ok=True)
    budget = request.cfg.memory.budget
    pruner = make_pruner(node.pruner, request.cfg.trainer.epochs)
    enqueued, fixed = given_points(node, space), fixed_settings(request.cfg, space)
    task = Task(
        node.study, where, space, resolved_settings(request.cfg, space, device), metric,
        node.objectives, data=data, repeats=node.repeats,
    )  # fmt: skip
    earlier = [open_earlier(name, storage, task) for name in node.earlier_studies]
    reservations = Reservations(
        None, space, node.n_trials, request.folder, node.seed, given_only,  # type: ignore[arg-type]
    )  # fmt: skip
    with reservations.locked(), none_left_behind(node.study, storage, request.folder):
        study = open_study(
            node.study,
            storage,
            sampler,
            pruner,
            node.objectives,
            metric,
            {"space": space.as_json(), "memory.budget": None if budget is None else str(budget),
             "repeats": node.repeats, "setting": fixed},
        )  # fmt: skip
        claim(study, request.folder)
        settle_data(study, data)
        record_settings(study, task)
        worker = int(study.user_attrs.get(WORKERS, 0))
        study.set_user_attr(WORKERS, worker + 1)
        seed = seed_of(sampler, node.seed, worker)
        study.sampler = make_sampler(request.sampler, space, seed, len(node.objectives))
        reservations.study, reservations.seed = study, seed
        jobs.budget_bytes = settled_budget(study, jobs.budget_bytes, budget, available)
        for line in begin_warm(study, replace(task, budget_bytes=jobs.budget_bytes), earlier):
            print(line)
        if not isinstance(sampler, GridSampler) and not given_only:
            first = [] if study.user_attrs.get(ENQUEUED) else _preset_points(request, space, jobs)
            for point in first:
                put_first(study, point, **{PRESET: True})
            for point in enqueued:
                put_first(study, point)
            study.set_user_attr(ENQUEUED, True)
    return reservations


def put_points(reservations: Reservations, points: Sequence[dict[str, Any]]) -> int:
    """Give a retraining its points, and return how many of its trials are not ended.

    It has few, so that one which failed, and may not the next time, is tried once more.
    """
    with reservations.locked():
        for point in points:
            put_first(reservations.study, point, unless_failed=True)
        trials = reservations.study.get_trials(deepcopy=False)
        reservations.n_trials = len(trials)
    return sum(not trial.state.is_finished() for trial in trials)


@contextmanager
def none_left_behind(name: str, storage: BaseStorage, folder: Path) -> Iterator[None]:
    """Remove a study that was made in here, if it then turns out not to be begun."""
    with answering(name):
        new = name not in optuna.get_all_study_names(storage)
    token = folder / TOKEN_NAME
    claimed = token.exists()
    try:
        yield
    except UserError:
        with suppress(KeyError), answering(name):
            study = optuna.load_study(study_name=name, storage=storage) if new else None
            if study is not None and study.user_attrs.get(WORKERS, 1) < 2:  # nobody has joined
                optuna.delete_study(study_name=name, storage=storage)
                if not claimed:
                    token.unlink(missing_ok=True)
        raise


def settled_budget(study: Study, here: int | None, text: Any, available: int | None) -> int | None:
    """Return the budget of all trials: `auto` and a share are what they were at the beginning.

    Args:
        study: it is written down in it.
        here: what the setting stands for on this machine.
        text: the setting.
        available: see `open_search`.

    Raises:
        ConfigError: trials could not have it here.

    """
    known = study.user_attrs.get(BUDGET_BYTES)
    if known is None:
        if here is not None:
            study.set_user_attr(BUDGET_BYTES, here)
        return here
    if available is not None and known > available:
        raise ConfigError(
            f"the study {study.study_name} was begun where memory.budget={text} is "
            f"{format_bytes(known)}, and the device has {format_bytes(available)} here; give "
            "another search.study on this machine, or an amount that both have"
        )
    return int(known)


def settle_data(study: Study, here: str | None) -> None:
    """Write down which data the trials of a study share, or check that they are these.

    Args:
        study: of an earlier version, its trials say it; such a one may have read them otherwise.
        here: their fingerprint; None where it is not known, or trials have different data.

    Raises:
        ConfigError: the data are others, so that figures would not compare.

    """
    if here is None:
        return
    written, known = study.user_attrs.get(DATA), data_of(study)
    if known is not None and known != here:
        differ = f"(fingerprint {known}, and here {here})"
        if written is not None:
            raise ConfigError(
                f"the study {study.study_name} was begun with other data {differ}, or with a "
                "version of this program that read them otherwise, so that figures do not "
                f"compare; give another search.study={study.study_name}_2"
            )
        print(
            f"note: the study {study.study_name} is of an earlier version, which read its data "
            f"otherwise, or they have changed since {differ}"
        )
    if written is None:
        study.set_user_attr(DATA, here)


def _preset_points(request: Request, space: Space, jobs: TrialJobs) -> list[dict[str, Any]]:
    """Return the points of presets.

    Raises:
        ConfigError: one does not go with the other settings.

    """
    node = request.config
    found = []
    for preset in node.presets:
        try:
            values = jobs.worker.call(
                preset_values, preset, list(space.distributions), request.given, request.own,
                seconds=node.plan_time_limit_seconds,
            )  # fmt: skip
        except WorkerError as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"search.presets: {preset} does not go with these settings ({said}); leave it out "
                "with search.presets=[]"
            ) from error
        found.append(space.point(values))
    return [point for point in found if point]
