"""A command line from Python, as in a notebook: `train`, `grid`, `sweep`, `plan_run`.

    result = expt.train(["+memory=lite", "trainer.epochs=2"])

Each takes what its command line would say, composes and runs it in this process, and returns what
came of it. A mistake is raised as the error of `expt.errors` that says it. Hydra's global state,
logging, the current folder and the environment are afterwards as they were.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from expt.commands.plan import PlanResult
from expt.config.command_line import Job, Refusal, entry_of
from expt.config.compose import key, prepare_arguments
from expt.config.explain import explain
from expt.errors import ConfigError, SearchError, first_line
from expt.result import RunResult
from expt.search.winner import SweepSummary
from expt.uri import without_password

R = TypeVar("R")


def train(overrides: Sequence[str] = ()) -> RunResult:
    """Train once, as ``python -m expt`` does with these settings; see `RunResult.run_dir`.

    Raises:
        ExptError: a mistake in the settings or the data, or a fault that has a name.

    """
    (result,) = _run(overrides, (), RunResult)
    return result


def grid(overrides: Sequence[str]) -> list[RunResult]:
    """Train every combination, as ``python -m expt -m`` does; return a result for each.

    A job that was refused is ``failed``, and its `stop_reason` says why.

    Raises:
        ExptError: a mistake in what all of them share.

    """
    return _run(overrides, ("-m",), RunResult)


def sweep(overrides: Sequence[str]) -> SweepSummary:
    """Search for the best that fits, as ``python -m expt -m search=NAME`` does.

    Raises:
        ExptError: a mistake in the settings, or nothing fits.

    """
    if not any(key(line) == "search" for line in overrides):
        raise ConfigError("sweep: search=NAME says what is searched; give it among the settings")
    (summary,) = _run(overrides, ("-m",), SweepSummary)
    return summary


def plan_run(overrides: Sequence[str] = ()) -> PlanResult:
    """Predict the peak memory of a training, as ``task=plan`` does; nothing is trained.

    Raises:
        ExptError: a mistake in the settings or the data.

    """
    (planned,) = _run(overrides, ("task=plan",), PlanResult)
    return planned


def _run(overrides: Sequence[str], more: Sequence[str], kind: type[R]) -> list[R]:
    """Run a command line; return what its jobs returned, all of one kind."""
    if isinstance(overrides, str):
        raise ConfigError(f"settings are a list, like [{overrides!r}]")
    given = [line for line in map(str, overrides) if line not in more]
    wrong = [line for line in given if line in ("-m", "--multirun") or key(line) == "task"]
    if wrong:
        raise ConfigError(
            f"{wrong[0]}: which command runs is said by the function: train, grid, sweep, plan_run"
        )
    job = Job()
    with _restored():
        arguments = [*more, *given]
        try:
            arguments = prepare_arguments(arguments)
            sys.argv = [sys.argv[0], *arguments]
            entry_of(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(without_password(explain(error, arguments))) from error
    refused = [result for result in job.results if isinstance(result, Refusal)]
    if refused and (len(job.results) == 1 or kind is not RunResult):
        raise refused[0].error
    found = [_failed(one) if isinstance(one, Refusal) else one for one in job.results]
    if not found or not all(isinstance(one, kind) for one in found):
        raise SearchError(f"the command ended without a {kind.__name__}")
    return found


def _failed(refusal: Refusal) -> Any:
    return RunResult("failed", first_line(refusal.error))


@contextmanager
def _restored() -> Iterator[None]:
    """Put back what running a command line changes in this process."""
    hydra, job_config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    argv, path, folder = sys.argv, list(sys.path), os.getcwd()
    environment = dict(os.environ)
    loggers = [logging.getLogger(), logging.getLogger("hydra")]
    states = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        for logger, handlers, level, propagate in states:
            for handler in logger.handlers:
                if handler not in handlers:
                    handler.close()
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, job_config
        sys.argv, sys.path[:] = argv, path
        os.chdir(folder)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
