"""Processes of their own for what may crash, hang or fill a device: trials, and predictions.

They are forked by a server that has imported torch already (`expt.run.server`), and each has a CUDA
context of its own. Each leads a session, so that all it starts can be killed with it, and ends
itself when the process that asked for it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from expt.config.command_line import run_command
from expt.files import write_json
from expt.run.server import forkserver, main_left_alone
from expt.training.interruption import hear_signals

PROCESS_NAME, LOG_NAME = "process.json", "output.log"
GRACE_SECONDS = 20.0
"""Between asking a process to stop and killing it."""
RunLine = Callable[[Sequence[str]], int]
"""Runs one command line in this process; returns its exit code."""


class TrialProcess:
    """One command line in a process of its own.

    Args:
        run: see `RunLine`; found by its name in the new process.
        arguments: the command line.
        folder: where its output goes, ``output.log``, after what is there; it is made.
        environment: variables that it gets besides ours, as they are now.
        threads: of torch; None: as many as torch chooses.

    """

    def __init__(
        self,
        run: RunLine,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.folder = folder
        self.started = time.monotonic()
        self.stopping_since: float | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._process = forkserver().Process(
            target=_run_line,
            args=(
                run,
                list(arguments),
                str(folder),
                {**os.environ, **(environment or {})},
                threads,
            ),
            name=f"expt-{folder.name}",
        )
        with main_left_alone():
            self._process.start()

    @property
    def seconds(self) -> float:
        """Return how long ago it was started."""
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Return the exit code, the negative number of the signal that ended it, or None."""
        code = self._process.exitcode
        if code is None and self.stopping_since is not None:
            if time.monotonic() - self.stopping_since > GRACE_SECONDS:
                self.kill()
        elif code is not None:
            # What it started, and did not end, would go on.
            kill_group(self._process.pid)
            (self.folder / PROCESS_NAME).unlink(missing_ok=True)
        return code

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to save and end; it is killed if that takes too long."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            if self._process.exitcode is None and self._process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill it and all it started, and wait for the end."""
        self.stopping_since = self.stopping_since or time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            if self._process.pid is not None:
                os.kill(self._process.pid, signal.SIGKILL)
        kill_group(self._process.pid)
        self._process.join()


class WorkerError(Exception):
    """A `Worker` died, or took longer than it may."""


class Worker:
    """Calls functions in one process that is kept, and begun anew after a crash or a hang.

    Args:
        threads: of torch; None: as many as torch chooses.

    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._process: BaseProcess | None = None
        self._pipe: connection.Connection[Any, Any] | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float | None) -> Any:
        """Return what a function returns, which must not raise.

        Raises:
            WorkerError: it raised, crashed, or took more than `seconds`.

        """
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(seconds):
                raise WorkerError(f"it took more than {seconds:g} s")
            sound, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise WorkerError("its process died") from error
        except BaseException:  # the time is up, or Ctrl-C: the answer would be of another call
            self.close()
            raise
        if not sound:
            raise WorkerError(str(answer))
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            pid = self._process.pid
            with contextlib.suppress(ProcessLookupError):
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
            kill_group(pid)
            self._process.join()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _start(self) -> None:
        self.close()
        self._pipe, theirs = forkserver().Pipe()
        self._process = forkserver().Process(
            target=_serve, args=(theirs, dict(os.environ), self.threads), name="expt-worker"
        )
        with main_left_alone():
            self._process.start()
        theirs.close()


def kill_leftover(folder: Path) -> None:
    """Kill the process that a worker, now dead, started in a trial's folder, if it still runs."""
    try:
        process = json.loads((folder / PROCESS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if process.get("host") != identity()["host"] or not is_alive(process):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process["pid"], signal.SIGKILL)
    kill_group(process["pid"])
    while is_alive(process):
        time.sleep(0.01)


def visible_devices(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the CUDA devices that trials may use, by the names that select one."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _run_line(
    run: RunLine,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    threads: int | None,
) -> None:
    """Be the process of a trial."""
    become_independent()
    log = os.open(Path(folder) / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    write_json(Path(folder) / PROCESS_NAME, identity(), durable=False)
    have_environment(environment)
    have_threads(threads)
    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _serve(
    pipe: connection.Connection[Any, Any], environment: dict[str, str], threads: int | None
) -> None:
    """Be the process of a worker."""
    become_independent()
    have_environment(environment)
    have_threads(threads)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        pipe.send(answer)


def have_environment(environment: dict[str, str]) -> None:
    """Take these variables in the place of the server's, which are of when it started."""
    os.environ.clear()
    os.environ.update(environment)


def have_threads(count: int | None) -> None:
    """Let torch's kernels, here and in processes that are started from here, have so many."""
    if count is not None:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(count)
        torch.set_num_threads(count)


def become_independent() -> None:
    """Lead a session, and end with the process that asked for this one."""
    hear_signals()
    gc.freeze()  # what the server imported is never garbage: every collection is spared it
    os.setsid()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="expt-parent", daemon=True).start()


def kill_group(pid: int | None) -> None:
    """Kill what a process has left behind in its session."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


POLL_SECONDS = 0.1
SAVE_SECONDS = 60.0
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
                elif asked_at is not None and now - asked_at > SAVE_SECONDS:
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
    sys.exit(run_command(sys.argv[1:]))


def identity(pid: int | None = None) -> dict[str, Any]:
    """Return what tells a process from any other, also from a later one with its number."""
    pid = os.getpid() if pid is None else pid
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Tell whether a process of this machine, as `identity` named it, still runs."""
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_started(process["pid"]) == process["started"])


def _started(pid: int) -> str | None:
    """Return when a process was started, in ticks since boot; None where that is not told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The 22nd field of proc(5); the second is a name that may hold anything.
    after = stat.rpartition(")")[2].split()
    return None if after[0] == "Z" else after[19]
