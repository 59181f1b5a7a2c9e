"""`python -m expt` and `expt`: adapt Hydra, dispatch a task, turn every ending into an exit code.

0 completed; 2 the user's mistake; 130 or 143 stopped by a signal; 1 anything else: a message
where the cause is known, a traceback where it is not. There is one handler, `run_command`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expt.errors import ExptError

if TYPE_CHECKING:
    from omegaconf import DictConfig

DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from expt.composition import prepare_arguments
    from expt.explanation import explain
    from expt.tracking.uri import without_password

    results: list[Any] = []
    jobs: list[Any] = []
    argv = sys.argv
    prepared = list(arguments)
    try:
        prepared = prepare_arguments(arguments)
        sys.argv = [argv[0], *prepared]
        _run_hydra(jobs, results)
    except ExptError as error:
        print(f"error: {without_password(str(error))}", file=sys.stderr)
        return error.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {without_password(explain(error, prepared))}", file=sys.stderr)
        return 2
    except OSError as error:
        if jobs or error.errno not in DISK_ERRORS:
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
    for refusal in (result for result in results if isinstance(result, Refusal)):
        print(f"error: {refusal.error}", file=sys.stderr)
    return max((getattr(result, "exit_code", 0) for result in results), default=0)


@dataclass(frozen=True)
class Refusal:
    """A job that ended with one of our own errors."""

    error: ExptError

    @property
    def exit_code(self) -> int:
        """The error's."""
        return self.error.exit_code


def _run_hydra(jobs: list[Any], results: list[Any]) -> None:
    import hydra

    from expt.composition import conf_dir, register

    # Hydra then raises instead of printing and exiting 1, so that one handler decides.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # The console script should find a user's own modules like `python -m expt` does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    register()

    def job(cfg: DictConfig) -> Any:
        from expt.dispatch import run_task

        jobs.append(cfg)
        try:
            result = run_task(cfg)
        except ExptError as error:
            # As data: Hydra would print a line of its own, and of a grid's errors only the first.
            result = Refusal(error)
        results.append(result)
        return result

    entry = hydra.main(
        config_path=str(conf_dir()), config_name="config", execution_whitelist=["expt.*"]
    )
    entry(job)()


if __name__ == "__main__":
    main()
