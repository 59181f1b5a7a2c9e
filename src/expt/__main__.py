"""`python -m expt` and the console script `expt`."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import MutableMapping

from expt.config.command_line import run_command

SPINS = "1000"
"""Turns that a thread waits awake: those of GNU's OpenMP where threads are more than cores."""


def main() -> None:
    """Run the command line of this process and exit with its code.

    Of several processes that torchrun has started, the others do what the first one does.
    """
    let_threads_sleep(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        _leave(run_command(sys.argv[1:]))
    # torch reads it when it is imported; see `expt.config.command_line.entry_of`.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from expt.run.ranks import dismiss, follow

    if int(os.environ["RANK"]):
        _leave(follow())
    code = run_command(sys.argv[1:])
    if code == 0:
        dismiss()
    _leave(code)


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads that wait for one another sleep soon, unless it is set how they wait.

    GNU's lets them spin for milliseconds. Beside other processes that compute, a step then takes
    up to twice as long, and some take many times as long (`benchmarks/shared_cores.py`). It is read
    when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def _leave(code: int) -> None:
    """End the process now: taking torch's modules apart one by one would take seconds more.

    All that is to be done at an exit is done; a thread that must be waited for is waited for.
    """
    if any(not thread.daemon for thread in threading.enumerate()[1:]):
        sys.exit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads any more
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    main()
