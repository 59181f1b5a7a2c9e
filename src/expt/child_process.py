"""One command line of this package in a process of its own: what ends it ends nothing else.

    ended = run_apart(["+memory=lite", "hydra.run.dir=there"], Path("there.log"))
    ended.exit_code, ended.seconds

A segmentation fault, the kernel's OOM killer, or a hang costs that process alone. On Linux it
does not outlive the one that started it, however that one ends.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""How long a process that was asked to end may take to save what it has."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal a process gets when its parent dies."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: `exit_code` as `subprocess` has it, negative for a signal's number."""

    exit_code: int
    seconds: float
    timed_out: bool = False

    def because(self) -> str:
        """Say in words how a process ended that should not have."""
        if self.timed_out:
            return f"the time limit ended it after {self.seconds:.0f} s"
        if self.exit_code == -signal.SIGKILL:
            return "it was killed (SIGKILL), perhaps by the system for lack of host memory"
        if self.exit_code < 0:
            number = -self.exit_code
            known = number in set(signal.Signals)  # real-time signals have no name of their own
            return f"it was ended by {signal.Signals(number).name if known else f'signal {number}'}"
        return f"it ended with exit code {self.exit_code}"


def run_apart(
    lines: Sequence[str],
    log: Path,
    time_limit_seconds: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a command line and wait for its end; its output goes to `log`.

    Args:
        lines: the arguments of ``python -m expt``.
        log: written anew.
        time_limit_seconds: after which the process is asked to end, and then killed.
        stopped: asked all the time; once it says yes, the process is asked to save and end.

    """
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    asked_at: float | None = None
    timed_out = False
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *lines],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on
        )
        try:
            while process.poll() is None:
                now = time.monotonic()
                late = time_limit_seconds is not None and now - started > time_limit_seconds
                if asked_at is None and (late or stopped()):
                    asked_at, timed_out = now, late
                    process.terminate()  # it alone: it ends what it started as it likes
                elif asked_at is not None and now - asked_at > GRACE_SECONDS:
                    _kill(process)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            if process.poll() is None:  # a second Ctrl-C came through here
                _kill(process)
                process.wait()
    return Ended(process.returncode, time.monotonic() - started, timed_out)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    importlib.import_module("expt.__main__").main()
