"""Several processes that train one model: starting them, watching them, and being one of them.

``trainer.devices=N`` starts N (`supervise`): this process then trains nothing, passes signals on,
and says which one died if one does; the others are ended then. Under torchrun, which starts the
processes itself, the first composes the configuration, and the others follow it (`follow`), so
that all have the same run directory; nothing but the first writes there.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing import connection, reduction, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from expt.config.compose import register
from expt.config.ranks import launched
from expt.config.schema import Compile, TrackingConfig
from expt.config.settings import RunContext, Settings
from expt.errors import ExptError, RankError, UserError, first_line
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import device_type
from expt.memory.planning.predict import Plan
from expt.result import RunResult, load_result
from expt.run.build import build
from expt.run.process import (
    Ended,
    become_independent,
    have_environment,
    kill_group,
)
from expt.run.server import forkserver, main_left_alone, prepare_server
from expt.run.train import TrainJob
from expt.tracking.tracker import close_left_open
from expt.training.device import make_fabric
from expt.training.interruption import Interruption, Stopped
from expt.training.ranks import SeveralRanks, world

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves, and to record it, when one has died."""
BLAME_SECONDS = 1.0
"""Who is told by its own connections that another died may say so before that one's end is seen."""
TIMEOUT = timedelta(hours=2)
"""For what another process may take time over, like reading data; a death is seen at once."""

LEFT_BEHIND = "ignore:resource_tracker:UserWarning"
"""What Python's tracker says of semaphores that the loader of a killed process has left behind."""


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to start; see `expt.commands.train`."""

    cfg: DictConfig
    settings: Settings
    context: RunContext
    budget: Budget | None
    planned: Plan | None
    resuming: bool
    extending: bool


def run_together(prepared: Prepared, interruption: Interruption) -> RunResult:
    """Train in several processes: those that torchrun has started, or that this one starts.

    Raises:
        RankError: one of them died.
        UserError, Stopped: as `TrainJob.run`.

    """
    if launched() == 1:
        return supervise(prepared, interruption)
    join()
    SeveralRanks(torch.device("cpu")).from_first(lambda: prepared)
    return take_part(prepared, interruption)


def join() -> None:
    """Join the other processes, as the environment says (RANK, WORLD_SIZE, MASTER_ADDR, …)."""
    import torch.distributed as dist

    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)


def follow() -> int:
    """Be any process of torchrun's but the first: do what that one does; return the exit code."""
    register()
    join()
    ranks = SeveralRanks(torch.device("cpu"))
    while True:
        prepared: Prepared | None = ranks.from_first(lambda: None)
        if prepared is None:
            return 0
        try:
            with Interruption() as interruption:
                take_part(prepared, interruption)
        except Stopped as error:
            return error.exit_code
        except Exception as error:
            if not isinstance(error, ExptError):
                traceback.print_exc()
            print(f"error: rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
            return getattr(error, "exit_code", 1)


def dismiss() -> None:
    """Tell those that `follow` that there is nothing more to do."""
    join()
    SeveralRanks(torch.device("cpu")).from_first(lambda: None)


def take_part(
    prepared: Prepared, interruption: Interruption, blame: connection.Connection | None = None
) -> RunResult:
    """Be one of the processes of a training.

    Args:
        prepared: the training.
        interruption: told of signals.
        blame: says which process died, where this one only sees that one did.

    """
    rank, count = world()
    settings, context = prepared.settings, prepared.context
    trainer = settings.trainer
    with _silent(rank), _folder(context.run_dir, rank) as folder:
        fabric = make_fabric(trainer.device, settings.memory.precision, count, trainer.sharded)
        if rank:
            settings = replace(
                settings,
                tracking=TrackingConfig(loggers=[]),
                trainer=replace(
                    trainer,
                    progress=False,
                    profile=False,
                    # As the first process, whose profiled steps are eager.
                    compile=Compile.off if trainer.profile else trainer.compile,
                ),
            )
        job = TrainJob(
            prepared.cfg, settings, replace(context, run_dir=folder), fabric,
            build(settings, "data"), interruption, prepared.budget, prepared.planned,
            SeveralRanks(fabric.device, trainer.sharded), context.run_dir,
            lambda error: _explained(error, blame),
        )  # fmt: skip
        return job.run(prepared.resuming, prepared.extending)


@contextmanager
def _silent(rank: int) -> Iterator[None]:
    """Say nothing inside but errors, unless this is the first process."""
    if rank == 0:
        yield
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.stdout.flush()
    before, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)


@contextmanager
def _folder(run_dir: Path, rank: int) -> Iterator[Path]:
    """Give the run's directory to the first process, and to another one that is not kept."""
    if rank == 0:
        yield run_dir
        return
    with tempfile.TemporaryDirectory(prefix="expt-rank-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _explained(error: BaseException, blame: connection.Connection | None) -> BaseException:
    """Return the error to record: what happened elsewhere, where this is only what follows."""
    if not _is_consequence(error):
        return error
    words = "another process ended"
    if blame is not None:
        with suppress(EOFError, OSError):
            if blame.poll(GRACE_SECONDS / 2):
                words = blame.recv()
    return RankError(words)


def _is_consequence(error: BaseException) -> bool:
    """Tell whether an error only says that another process is gone."""
    import torch.distributed as dist

    lost = ("gloo", "Connection closed", "Connection reset", "NCCL", "TCPStore")
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error) for word in lost)
    )


@dataclass(frozen=True)
class Report:
    """How a process ended, in its own words; `trace` is of a fault that nobody foresaw."""

    kind: Literal["done", "consequence", "failed"]
    words: str = ""
    exit_code: int = 0
    trace: str = ""


@dataclass
class _Rank:
    """One of the processes that a supervisor has started."""

    number: int
    process: BaseProcess
    pipe: connection.Connection
    started: float = field(default_factory=time.monotonic)
    report: Report | None = None
    """What it said last."""

    @property
    def over(self) -> bool:
        return self.process.exitcode is not None

    def listen(self) -> None:
        """Take in what it has said."""
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                self.report = self.pipe.recv()

    def failure(self) -> Report | None:
        """Return what was wrong with it; None: nothing that it knows of."""
        if self.report is not None:
            if self.report.kind != "failed":
                return None
            return replace(self.report, words=f"rank {self.number}: {self.report.words}")
        if not self.over:
            return None
        ended = Ended(self.process.exitcode or 0, time.monotonic() - self.started)
        return Report("failed", f"rank {self.number} died: {ended.because()}", 1)


def supervise(prepared: Prepared, interruption: Interruption) -> RunResult:
    """Start the processes of a training, and wait for their end.

    Raises:
        RankError: one of them failed; the others are ended.
        Stopped: a signal came, and the processes have saved what they have.

    """
    from torch._C._distributed_c10d import TCPStore

    count = prepared.settings.trainer.devices
    prepare_server([__name__])
    _start_tracker()
    # As torchrun's agent: the store is here, so that no port has to be found beforehand.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [_started(prepared, rank, count, store.port) for rank in range(count)]
    try:
        failed = _watched(ranks, interruption)
        if failed is not None:
            _tell_and_wait(ranks, failed.words)
    finally:
        for rank in ranks:
            if not rank.over and rank.process.pid is not None:
                kill_group(rank.process.pid)
            rank.process.join()
            kill_group(rank.process.pid)
            rank.pipe.close()
        del store
    if failed is not None:
        print(failed.trace, end="", file=sys.stderr)
        raise _recorded(prepared, failed.words, failed.exit_code)
    if interruption.received is not None:
        raise Stopped(interruption.received)
    result = load_result(prepared.context.run_dir)
    if result is None:
        raise RankError(f"{prepared.context.run_dir} has no result that can be read")
    return result


class _Output:
    """The output and errors of this process, for a process that it starts to have as well.

    A server that forks has them as they were when it was started.
    """

    def __init__(self, sent: Sequence[Any] = ()) -> None:
        self._sent = sent

    def __reduce__(self) -> tuple[Any, ...]:
        return _Output, ([reduction.DupFd(stream) for stream in (1, 2)],)

    def take(self) -> None:
        """Make them those of this process."""
        for stream, sent in zip((1, 2), self._sent, strict=True):
            descriptor = sent.detach()
            os.dup2(descriptor, stream)
            os.close(descriptor)


def _start_tracker() -> None:
    """Start what removes semaphores that killed processes leave behind, so that it is silent."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, LEFT_BEHIND)))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _started(prepared: Prepared, rank: int, count: int, port: int) -> _Rank:
    ours, theirs = forkserver().Pipe()
    environment = {
        **os.environ,
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    process = forkserver().Process(
        target=_be_rank, args=(prepared, environment, theirs, _Output()), name=f"expt-rank-{rank}"
    )
    with main_left_alone():
        process.start()
    theirs.close()
    return _Rank(rank, process, ours)


def _watched(ranks: list[_Rank], interruption: Interruption) -> Report | None:
    """Wait until all have ended, or one has failed; return its report then."""
    passed_on = False
    suspected: float | None = None
    while not all(rank.over for rank in ranks):
        if interruption.received is not None and not passed_on:
            passed_on = True
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank.process.pid or 0, interruption.received)
        waiting: list[Any] = [rank.process.sentinel for rank in ranks if not rank.over]
        connection.wait(waiting, timeout=0.1)
        for rank in ranks:
            rank.listen()
        found = next((f for rank in ranks if (f := rank.failure()) is not None), None)
        if found is not None:
            return found
        if any(rank.report and rank.report.kind == "consequence" for rank in ranks):
            suspected = suspected or time.monotonic()
            if time.monotonic() - suspected > BLAME_SECONDS:
                break
    for rank in ranks:
        rank.listen()
    failures = [rank.failure() for rank in ranks]
    lost = [rank.report for rank in ranks if rank.report and rank.report.kind == "consequence"]
    lost = [replace(one, words=f"the processes lost each other: {one.words}") for one in lost]
    return next((report for report in (*failures, *lost) if report is not None), None)


def _tell_and_wait(ranks: list[_Rank], words: str) -> None:
    """Tell the others who failed, so that they record it, and give them a moment."""
    for rank in ranks:
        with suppress(OSError):
            rank.pipe.send(words)
    end = time.monotonic() + GRACE_SECONDS
    while not all(rank.over for rank in ranks) and time.monotonic() < end:
        connection.wait([rank.process.sentinel for rank in ranks if not rank.over], timeout=0.1)


def _recorded(prepared: Prepared, words: str, code: int) -> ExptError:
    """Return the error to end with; what the first process could not record is recorded."""
    run_dir = prepared.context.run_dir
    tracking = prepared.settings.tracking
    close_left_open(tracking, run_dir, prepared.context.parent_dir, "FAILED")
    if code != UserError.exit_code and load_result(run_dir) is None:
        preset = prepared.settings.memory.preset
        RunResult(
            "failed",
            f"RankError: {words}"[:500],
            preset=preset.value if preset else None,
            device=device_type(prepared.settings.trainer.device.value),
        ).save(run_dir)
    return UserError(words) if code == UserError.exit_code else RankError(words)


def _be_rank(
    prepared: Prepared,
    environment: dict[str, str],
    pipe: connection.Connection,
    output: _Output,
) -> None:
    """Be a process that a supervisor started."""
    become_independent()
    output.take()
    have_environment(environment)
    register()
    _share_cores(int(environment["WORLD_SIZE"]))
    try:
        with Interruption() as interruption:
            join()
            take_part(prepared, interruption, pipe)
        report = Report("done")
    except Stopped as error:
        report = Report("done", exit_code=error.exit_code)
    except BaseException as error:
        report = _report(error)
    pipe.send(report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(report.exit_code)


def _report(error: BaseException) -> Report:
    if isinstance(error, RankError) or _is_consequence(error):
        return Report("consequence", first_line(error), 1)
    if isinstance(error, ExptError):
        return Report("failed", str(error), error.exit_code)
    known = isinstance(error, torch.OutOfMemoryError)
    trace = "" if known else "".join(traceback.format_exception(error))
    return Report("failed", first_line(error), 1, trace)


def _share_cores(count: int) -> None:
    """Use this process's part of the cores, unless the environment says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // count, 1))
