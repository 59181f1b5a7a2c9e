"""The server that processes are forked from: `multiprocessing`'s, with what it imports first.

It imports once what all of them take, and does nothing else, so that each starts in a moment.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver as forkserver_module
from multiprocessing.forkserver import ensure_running
from typing import Any

from expt.training.interruption import signals_held


def prepare_server(modules: Sequence[str]) -> None:
    """Name what the server imports before it forks; once it runs, this changes nothing."""
    forkserver().set_forkserver_preload(list(modules))


def start_server(modules: Sequence[str]) -> bool:
    """Let the server begin to import what it has before it forks; return whether it begins now.

    It does so beside what this process imports in the meantime. Once it runs, nothing changes.
    """
    server: Any = forkserver_module._forkserver
    before = server._forkserver_pid
    prepare_server(modules)
    with signals_held():
        ensure_running()
    return bool(server._forkserver_pid != before)


def stop_server() -> None:
    """End the server at once, also while it imports: it has this process's output as well.

    The next process that is wanted starts another one.
    """
    server: Any = forkserver_module._forkserver  # it has no public way to be stopped
    if server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            server._stop()


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return what starts processes by forking a server that has imported torch already."""
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def main_left_alone() -> Any:
    """Keep `multiprocessing` from running this program's main file again in the new process.

    Signals are held back, since this may start the server.
    """
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__",) if name in main.__dict__}
    spec = getattr(main, "__spec__", None)
    main.__spec__ = None
    try:
        with signals_held():
            yield
    finally:
        main.__dict__.update(hidden)
        main.__spec__ = spec
