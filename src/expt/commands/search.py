"""`python -m expt -m search=NAME`: from the composed configuration to a running search.

Called by the shim in ``src/hydra_plugins/expt_sweeper``. It judges everything before the first
trial, opens the study, joins `expt.search` to what a trial is here (`expt.search.candidates`),
and ends with the winner: tested once, drawn, and told as a command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from optuna.samplers import BaseSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.study import Study

from expt.commands.report import write_page
from expt.config.command_line import Job, run_command
from expt.config.compose import key, readable_setting
from expt.config.schema import OnOverflow, TrackingConfig
from expt.config.search_node import Pruner, SearchConfig
from expt.errors import ConfigError, ExptError, SearchError
from expt.reports.figures.progress import plot_progress
from expt.reports.figures.trade_off import plot_trade_off
from expt.reports.records import ranked_by
from expt.reports.sources.folders import runs_of_search
from expt.run.process import Worker, WorkerError, visible_devices
from expt.search.candidates import (
    Learned,
    TrialJobs,
    base_facts,
    check_presets,
    checker,
    learn_data,
    memory_lines,
)
from expt.search.exhaustion import smallest_seen
from expt.search.launcher import PRUNED_LATE, UNLIMITED, LauncherRunner
from expt.search.loop import Search
from expt.search.metric import metric_of, objectives_of
from expt.search.opening import none_left_behind, open_search, put_points
from expt.search.parallel import side_by_side
from expt.search.records import Records
from expt.search.request import Request, request_of
from expt.search.reservation import Reservations
from expt.search.retraining import of_retraining, points_to_retrain, retraining_of
from expt.search.runner import ProcessRunner, Runner
from expt.search.samplers import make_sampler
from expt.search.space import Space, settings_lines
from expt.search.stored import StudyError
from expt.search.study import (
    absolute_storage,
    answering,
    default_storage,
    open_storage,
)
from expt.search.trial import TECHNIQUES, technique_lines
from expt.search.winner import SweepSummary, best_trial, run_test
from expt.units import counted, format_bytes
from expt.uri import shown_lines, without_password


def search(
    config: DictConfig,
    arguments: Sequence[str],
    sampler: Any,
    hydra_context: HydraContext,
    task_function: TaskFunction,
) -> SweepSummary:
    """Run a search and its retraining to their end, or what is left of them.

    Return how the last of them stands.

    Raises:
        UserError: something is wrong with the configuration, the space or the storage.
        SearchError: nothing fits.
        Stopped: SIGINT or SIGTERM.

    """
    request = request_of(config, arguments, sampler, hydra_context)
    judged, longer, again = _judge(request, config), None, None
    if request.config.retrain:  # now, since a mistake is to be known before hours of search
        with of_retraining():
            found = retraining_of(request, config, arguments, hydra_context)
            longer = _judge(found, config, judged)
    with none_left_behind(request.config.study, judged.storage, request.folder):
        opened = _open(judged)
        if longer is not None:
            with of_retraining():
                again = _open(longer, judged)
    summary = _run(opened, config, hydra_context, task_function)
    if again is not None:
        _choose_points(again, opened)
        try:
            summary = _run(again, config, hydra_context, task_function)
        except SearchError as error:
            raise SearchError(
                f"the retraining: {error}. What the search found stands: search.retrain=0 tests "
                "its winner, and the same command trains again what crashed or was killed"
            ) from error
    if isinstance(task_function, Job):
        task_function.results.append(summary)
    return summary


def _choose_points(again: _Opened, opened: _Opened) -> None:
    """Give a retraining the best points of its search, and those of presets."""
    request = opened.judged.request
    limited = opened.judged.jobs.budget_bytes is not None
    with answering(request.config.study):
        best, presets = points_to_retrain(
            opened.reservations.study, limited, request.config.retrain, again.judged.space
        )
        left = put_points(again.reservations, [*best, *presets])
    also = f" and {counted(len(presets), 'preset')}" if presets else ""
    said = " ".join(shown_lines(request.config.retrain_with))
    print(
        f"the best {len(best)} of {request.config.study}{also} again with {said}: {left} to train"
    )


@dataclass
class _Judged:
    """A search in which no mistake was found; `device_bytes` is None where a launcher decides."""

    request: Request
    space: Space
    sampler: BaseSampler
    storage: BaseStorage
    where: str
    jobs: TrialJobs
    learned: Learned
    device: str
    device_bytes: int | None
    devices: Sequence[str]


@dataclass
class _Opened:
    """A search whose study is open."""

    judged: _Judged
    reservations: Reservations


def _judge(request: Request, config: DictConfig, retrained: _Judged | None = None) -> _Judged:
    """Judge a search, or the retraining of another one."""
    node = request.config
    tracking = cast(TrackingConfig, OmegaConf.to_object(request.cfg.tracking))
    space = Space.parse(request.space, checker(request.cfg, request.own))
    made = make_sampler(request.sampler, space, node.seed, len(node.objectives))
    check_presets(node.presets, request.own)
    text = node.storage or default_storage(tracking.uri)
    storage = open_storage(text) if retrained is None else retrained.storage
    facts = _facts(request)
    launcher = _launcher_name(config)
    on_cpu = request.cfg.trainer.device.value in ("cpu", "mps")
    devices = [] if on_cpu or launcher is not None else visible_devices()
    searched = None if retrained is None else retrained.request.config
    most = None if searched is None else searched.retrain + len(searched.presets)
    beside = side_by_side(
        node.n_jobs, devices, facts["device"] == "mps", facts["budget_bytes"], launcher, most
    )
    node.n_jobs = beside.n_jobs
    if beside.note is not None and retrained is None:
        print(beside.note)
    jobs = TrialJobs(
        request.given,
        request.own,
        request.folder,
        facts["budget_bytes"],
        bool(request.cfg.memory.plan),
        node.plan_time_limit_seconds,
        Worker(beside.threads),  # what a kernel takes inside depends on the number of threads
        space.distributions,
        request.cfg.memory.on_overflow is OnOverflow.adapt,
    )
    try:
        learned = learn_data(
            request, space, jobs.worker, retrained is not None and retrained.learned.asked
        )
    finally:
        if retrained is not None:
            jobs.worker.close()  # until the search is over
    node.objectives = objectives_of(node.objectives, learned.metric)
    device_bytes = None if launcher is not None else facts["device_bytes"]
    return _Judged(
        request, space, made, storage, text, jobs, learned, facts["device"], device_bytes, devices
    )


def _open(judged: _Judged, retrained: _Judged | None = None) -> _Opened:
    """Open the study of a search, or of the retraining of another one."""
    request, jobs = judged.request, judged.jobs
    if retrained is not None:
        names = {key(line) for line in retrained.request.config.retrain_with}
        if "memory.budget" not in names:  # a share is what it was for the search
            jobs.budget_bytes = retrained.jobs.budget_bytes
    reservations = open_search(
        request, judged.space, judged.storage, judged.sampler, jobs, judged.learned.metric,
        judged.learned.fingerprint, judged.where, judged.device, judged.device_bytes,
        retrained is not None,
    )  # fmt: skip
    if isinstance(judged.sampler, GridSampler) and judged.space.size is not None:
        reservations.n_trials = min(request.config.n_trials, judged.space.size)
    return _Opened(judged, reservations)


def _run(
    opened: _Opened, config: DictConfig, hydra_context: HydraContext, task_function: TaskFunction
) -> SweepSummary:
    """Do what is left of a search, and conclude it; see `search` for what is raised."""
    judged, reservations = opened.judged, opened.reservations
    request, space, jobs = judged.request, judged.space, judged.jobs
    node, study = request.config, reservations.study
    metric, node.n_trials = metric_of(study), reservations.n_trials
    storage = without_password(absolute_storage(judged.where))
    tracking = cast(TrackingConfig, OmegaConf.to_object(request.cfg.tracking))
    records = Records(tracking, request.folder, node.study, metric)
    threads = jobs.worker.threads
    runner = _runner(request, config, hydra_context, task_function, judged.devices, threads)
    seeds = range(request.cfg.trainer.seed, request.cfg.trainer.seed + node.repeats)
    loop = Search(
        node, space, reservations, runner, jobs, records, request.folder, list(seeds), storage
    )
    if isinstance(runner, LauncherRunner):
        runner.beat = loop.beat
    _announce(node, space, jobs.budget_bytes, storage, request.folder)
    with reservations.locked():
        records.open(_parameters(request, space, type(judged.sampler).__name__, jobs.budget_bytes))
    status: Any = "FAILED"
    seen = None
    try:
        with answering(node.study):
            records.reconcile(study, loop.trial_folder)
            loop.run()
            winner = best_trial(study.get_trials(deepcopy=False), loop.limited, metric)
            if winner is not None and node.test_winner and node.retrain == 0:
                point = [*space.lines(winner.params), *technique_lines(winner)]
                lines = jobs.lines(winner.number, point)
                folder = loop.trial_folder(winner.number)
                try:
                    run_test(study, winner, reservations, runner, lines, folder, list(seeds))
                finally:  # its run was opened again
                    records.told(winner, folder)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        with suppress(ExptError), answering(node.study):
            seen = smallest_seen(study, loop.nearest, jobs.budget_bytes, space)
        raise
    finally:
        jobs.worker.close()
        summary = SweepSummary.load(request.folder) or SweepSummary(node.study, node.n_trials)
        try:
            with answering(node.study):
                summary = loop.summary()
            with answering(node.study):
                _draw(study, jobs.budget_bytes, request.folder, status == "FINISHED")
        finally:  # also without the storage: the parent's run is not left open
            _conclude(summary, request, space, seen)
            records.close(status, summary)
    summary.run_dir = request.folder
    return summary


def _draw(study: Study, budget_bytes: int | None, folder: Path, whole_page: bool = False) -> None:
    """Draw the search over time, and its metric against peak memory, as a report has them.

    With `whole_page`, which takes seconds, the report itself. The study is read as it is open here,
    with the password that its summary does not hold.
    """
    try:
        runs = runs_of_search(study, budget_bytes, folder)
    except StudyError:
        return  # there is no trial to be drawn
    if whole_page:
        command = shlex.join(
            ["python", "-m", "expt", "task=report", readable_setting("report.runs", folder)]
        )
        try:
            print(f"page: {write_page(runs, folder, command)}")
            return
        except Exception as error:  # the search is over and well; its page is not worth a fault
            print(f"note: there is no page of this search ({type(error).__name__}: {error})")
    runs = ranked_by(runs, f"val/{metric_of(study).name}")
    for plot in (plot_trade_off, plot_progress):
        plot(runs.records, runs.metric, budget_bytes, folder / "plots")


def _facts(request: Request) -> dict[str, Any]:
    """Judge the settings that all trials share, and tell the budget, in a process of its own.

    Raises:
        ConfigError: with every problem found.

    """
    worker = Worker()
    seconds = request.config.plan_time_limit_seconds
    try:
        found = worker.call(base_facts, request.given, request.own, seconds=seconds)
    except WorkerError as error:
        raise ConfigError(f"the settings cannot be judged: {error}") from error
    finally:
        worker.close()
    if found["problems"]:
        raise ConfigError(found["problems"])
    return cast(dict[str, Any], found)


def _launcher_name(config: DictConfig) -> str | None:
    """Return the Hydra launcher that trials go to, None where they are processes of ours."""
    if str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
        return None
    return str(config.hydra.runtime.choices.get("hydra/launcher"))


def _runner(
    request: Request,
    config: DictConfig,
    hydra_context: HydraContext,
    task_function: TaskFunction,
    devices: Sequence[str] = (),
    threads: int | None = None,
) -> Runner:
    """Return what starts trials: processes here, or the launcher that was chosen."""
    node = request.config
    name = _launcher_name(config)
    if name is not None:
        if node.pruner is not Pruner.none:
            print(PRUNED_LATE.format(launcher=name, pruner=node.pruner.value))
        if node.trial_time_limit_seconds is not None:
            print(UNLIMITED.format(launcher=name))
        sweep = config.hydra.sweep
        with read_write(sweep), open_dict(sweep):
            sweep.dir = str(request.folder)
        launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )
        return LauncherRunner(launcher, request.folder)
    arguments = [f"--config-dir={request.own}"] if request.own else []
    return ProcessRunner(run_command, arguments, devices, threads)


def _parameters(
    request: Request, space: Space, sampler: str, budget_bytes: int | None
) -> Mapping[str, Any]:
    node = request.config
    return {
        "search": {
            "study": node.study,
            "sampler": sampler,
            "pruner": node.pruner.value,
            "repeats": node.repeats,
            "objectives": list(node.objectives),
            "budget_bytes": budget_bytes,
            "space": {name: request.space[name] for name in space.distributions},
        },
        "overrides": " ".join(shown_lines(request.given)),
    }


def _announce(
    node: SearchConfig, space: Space, budget_bytes: int | None, storage: str, folder: Path
) -> None:
    limit = "no budget" if budget_bytes is None else f"inside {format_bytes(budget_bytes)}"
    points = "" if space.size is None else f", {space.size:,} points"
    until = "" if node.time_limit_seconds is None else f" for {node.time_limit_seconds:g} s"
    print(
        f"search {node.study}: {counted(len(space.distributions), 'setting')}{points}, {limit}, "
        f"{counted(node.n_trials, 'trial')}{until}, {node.n_jobs} at a time; {storage}; {folder}",
        flush=True,
    )


def _conclude(
    summary: SweepSummary, request: Request, space: Space, seen: str | None = None
) -> None:
    """Say what was found, and how to train it again; `seen` is for where nothing was found yet."""
    print(
        f"{summary.finished} of {summary.n_trials} trials trained: {summary.pruned} pruned, "
        f"{summary.infeasible_measured} ran out of memory, {summary.failed} failed; not started: "
        f"{summary.infeasible_predicted} that would not fit, {summary.duplicates} duplicates"
    )
    best = summary.best
    if best is None and seen is not None:
        print(f"nothing fits so far: {seen}")
    if best is not None:
        metric = summary.compared_by
        tested = best.get(f"test/{metric.name}")
        test = "" if tested is None else f", test {metric.label} {metric.text(tested)}"
        print(
            f"best: trial {best['trial']}, val {metric.label} {metric.text(summary.best_value)}"
            f"{test}, peak {format_bytes(best['peak_allocated_bytes'])}"
        )
        kept = [line for line in shown_lines(request.given) if not key(line).startswith("search.")]
        own = [f"--config-dir={request.own}"] if request.own else []
        if summary.budget_bytes is not None:  # like every trial: measured, not predicted
            fixed = memory_lines(summary.budget_bytes)
            kept = [line for line in kept if key(line) not in set(map(key, fixed))] + fixed
        point = space.lines(space.point(best["params"]))
        point += settings_lines(best.get(TECHNIQUES, {}))
        lines = [*own, *kept, f"search.trial={best['trial']}", *point]
        one = f", one of {request.config.repeats} seeds" if request.config.repeats > 1 else ""
        print(f"again{one}: python -m expt {shlex.join(lines)}")
    print(f"files: {request.folder}")
