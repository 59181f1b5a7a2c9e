"""From a command line to the task that it names, and from every ending to an exit code.

0 completed; 2 the user's mistake; 130 or 143 stopped by a signal; 1 anything else: a message
where the cause is known, a traceback where it is not. There is one handler, `run_command`.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from expt.config.compose import conf_dir, key
from expt.config.settings import RunContext
from expt.errors import ConfigError, ExptError, UserError
from expt.files import make_private, remove_empty_date
from expt.locks import run_lock

log = logging.getLogger(__name__)

HYDRA_FILES = {".hydra", "expt.log"}
"""What Hydra itself leaves in a run's directory before a task starts."""


def run_task(cfg: DictConfig) -> Any:
    """Run the configured task; leave nothing behind if it refuses the configuration or data."""
    with _tidied(cfg) as context:
        return get_method(cfg.task._target_)(cfg, context)


@contextmanager
def _tidied(cfg: DictConfig) -> Iterator[RunContext]:
    """Yield where a task runs; remove what a refused one left, free what a failed one holds."""
    context = _context(cfg)
    failed = False
    try:
        make_private(context.run_dir / ".hydra", context.run_dir / "expt.log")
        with run_lock(context.run_dir):
            _refuse_search(cfg)
            _refuse_other_tasks(cfg)
            yield context
    except Exception as error:
        if isinstance(error, UserError):
            _remove_traces(context.run_dir)
        if context.parent_dir is not None:
            if not isinstance(error, ExptError):
                # Hydra shows one error at the end; the others of a grid would be lost.
                log.error("job %s failed: %s", context.run_dir.name, error)
            # Hydra keeps the error, whose frames keep the model that the next job has no room for.
            traceback.clear_frames(error.__traceback__)
            failed = True
        raise
    finally:
        if failed:
            _free_memory()


def _refuse_search(cfg: DictConfig) -> None:
    """Refuse a search that is not run as one; its trials know their number."""
    if cfg.search is None or cfg.search.trial is not None:
        return
    raise ConfigError(
        f"search={HydraConfig.get().runtime.choices.get('search')} is a search over many trials: "
        "start it with python -m expt -m search=NAME (and the sweeper its file names); to train "
        "once, leave search out"
    )


def _refuse_other_tasks(cfg: DictConfig) -> None:
    """Refuse to call anything but a task of this package."""
    if re.fullmatch(r"expt\.commands\.[\w.]+\.run", str(cfg.task._target_)) is None:
        known = sorted(path.stem for path in (conf_dir() / "task").glob("*.yaml"))
        raise ConfigError(
            f"task._target_={cfg.task._target_} is no task of expt's, and nothing else is called; "
            f"task=NAME chooses one: {', '.join(known)}"
        )


def _context(cfg: DictConfig) -> RunContext:
    hydra_cfg = HydraConfig.get()
    own = [
        source.path
        for source in hydra_cfg.runtime.config_sources
        if source.provider == "command-line"
    ]
    # As they were typed: read one by one, an interpolation would be resolved, a password's too.
    typed = cast("list[str]", OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False))
    lines = [line for line in typed if key(line) != "trainer.resume"]
    is_child = hydra_cfg.mode == RunMode.MULTIRUN
    parent = Path(hydra_cfg.sweep.dir) if is_child else cfg.tracking.parent
    return RunContext(
        run_dir=Path(hydra_cfg.runtime.output_dir),
        parent_dir=None if parent is None else Path(parent).absolute(),
        overridden=frozenset(map(key, typed)),
        launch={
            "overrides": lines,
            "cwd": hydra_cfg.runtime.cwd,
            "config_dir": own[0] if own else None,
        },
    )


def _remove_traces(run_dir: Path) -> None:
    """Remove what Hydra wrote for a job that never started, and the folders made for it."""
    if not {entry.name for entry in run_dir.iterdir()} <= HYDRA_FILES:
        return
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    with suppress(OSError):
        (run_dir / "expt.log").unlink(missing_ok=True)
        run_dir.rmdir()
        remove_empty_date(run_dir.parent)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from expt.config.compose import prepare_arguments
    from expt.config.explain import explain
    from expt.uri import without_password

    if (problem := _name_problem(arguments)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    job = Job()
    argv = sys.argv
    prepared = list(arguments)
    try:
        prepared = prepare_arguments(arguments)
        sys.argv = [argv[0], *prepared]
        entry_of(job)()
    except ExptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {without_password(explain(error, prepared))}", file=sys.stderr)
        return 2
    except OSError as error:
        if job.started or error.errno not in DISK_ERRORS:
            raise  # not Hydra making the run's directory: a fault in a job
        print(
            f"error: cannot write {error.filename or 'the output directory'}: {error.strerror}; "
            "what was saved before is intact. Choose another folder with hydra.run.dir=FOLDER",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as error:
        return getattr(error, "exit_code", 130)
    finally:
        sys.argv = argv
    for refusal in (result for result in job.results if isinstance(result, Refusal)):
        print(f"error: {refusal.error}", file=sys.stderr)
    return max((getattr(result, "exit_code", 0) for result in job.results), default=0)


def _name_problem(arguments: Sequence[str]) -> str | None:
    """Return that the current folder is gone, or a name is not text, which YAML cannot hold."""
    try:
        names = {"the current folder": os.getcwd()}
    except FileNotFoundError:
        return "the current folder is not there any more; change to another one"
    names |= {f"argument {number}": text for number, text in enumerate(arguments, 1)}
    for what, name in names.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name).decode(errors="backslashreplace")
            return f"{what}, {shown}, is not UTF-8, and settings are written as UTF-8; rename it"
    return None


class Job:
    """What Hydra calls with each configuration that a command line composes.

    `results` is what the tasks returned, or a `Refusal`; of a search, its summary.
    """

    def __init__(self) -> None:
        self.started = 0
        self.results: list[Any] = []

    def __call__(self, cfg: DictConfig) -> Any:
        """Run the configured task."""
        self.started += 1
        try:
            with _tidied(cfg) as context:
                result = get_method(cfg.task._target_)(cfg, context)
        except ExptError as error:
            # As data: Hydra would print a line of its own, and of a grid's errors only the first.
            result = Refusal(error)
        self.results.append(result)
        return result


@dataclass(frozen=True)
class Refusal:
    """A job that ended with one of our own errors."""

    error: ExptError

    @property
    def exit_code(self) -> int:
        """The error's."""
        return self.error.exit_code


def entry_of(job: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Return what runs Hydra on this process's arguments, and `job` on what it composes."""
    import hydra

    from expt.config.compose import CONFIG_NAME, register

    # Hydra then raises instead of printing and exiting 1, so that one handler decides.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # The meter reads the CPU allocator's events, which torch comments on with a warning of its own.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The console script should find a user's own modules like `python -m expt` does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    register()
    entry: Callable[[Any], Callable[[], None]] = hydra.main(
        config_path=str(conf_dir()), config_name=CONFIG_NAME, execution_whitelist=["expt.*"]
    )
    return entry(job)
