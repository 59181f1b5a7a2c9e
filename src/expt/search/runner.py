"""A trial that is under way, as the search sees it: `Running`, and one made of processes."""

from __future__ import annotations

import json
import math
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from expt.config.compose import setting
from expt.files import write_json
from expt.job import Metric
from expt.result import PLAN_NAME, Outcome
from expt.run.process import RunLine, TrialProcess, kill_leftover
from expt.search.ending import Ending, outcome_of, set_aside
from expt.search.trial import TrialOutcome
from expt.training.checkpoint import FOLDER as CHECKPOINTS
from expt.training.display import FILE_NAME as PROGRESS_NAME

Stop = Literal["pruned", "signal"]


@dataclass(frozen=True)
class Job:
    """One trial to be trained.

    Args:
        number: of the trial.
        lines: its settings, without those that say where and with which seed.
        folder: its own.
        seeds: one run per seed, one after the other.
        plan: the content of ``plan.json``, so that no run predicts again.
        budget_bytes: the limit.
        time_limit_seconds: for each run; longer is a hang.
        test: test the best weights too.
        metric: that trials are compared by.
        data: the fingerprint of those that trials share, None where it is not known.

    """

    number: int
    lines: Sequence[str]
    folder: Path
    seeds: Sequence[int]
    plan: dict[str, Any] | None = None
    budget_bytes: int | None = None
    time_limit_seconds: float | None = None
    test: bool = False
    metric: Metric | None = None
    data: str | None = None

    def run_folder(self, index: int) -> Path:
        """Return the folder of the run with one of the seeds."""
        return self.folder if len(self.seeds) == 1 else self.folder / f"seed_{self.seeds[index]}"

    def run_lines(self, index: int) -> list[str]:
        """Return the settings of the run with one of the seeds, but for its folder."""
        own = [f"trainer.test={str(self.test).lower()}"]
        if len(self.seeds) > 1:
            own += [f"trainer.seed={self.seeds[index]}", setting("tracking.parent", self.folder)]
        if self.plan is not None:
            own.append(setting("memory.plan_file", self.folder / PLAN_NAME))
        return [*self.lines, *own, "trainer.resume=true"]

    def prepare(self) -> None:
        """Write what the runs read, and put aside what an earlier attempt left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in range(len(self.seeds)):
            kill_leftover(self.run_folder(index))
            if self.run_folder(index).exists():
                set_aside(self.run_folder(index))
        if self.plan is not None:  # in the place of that of an earlier attempt
            write_json(self.folder / PLAN_NAME, self.plan, durable=False)
        else:
            (self.folder / PLAN_NAME).unlink(missing_ok=True)


class Running(Protocol):
    """A trial that was started."""

    def poll(self) -> TrialOutcome | None:
        """Return how it ended, None while it has not."""

    def epochs(self) -> list[tuple[int, float]]:
        """Return (epoch, monitored figure) of the epochs that ended since the last call."""

    def stop(self, why: Stop) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


class Runner(Protocol):
    """Starts trials."""

    prunes: bool
    """Whether `Running.epochs` tells anything before the end."""

    def start(self, job: Job) -> Running:
        """Start a trial, or put it into the next batch."""

    def flush(self) -> None:
        """Start a batch that waits to be complete."""


class ProcessTrial:
    """A trial whose runs are processes of this machine, one seed after the other."""

    def __init__(
        self,
        job: Job,
        run: RunLine,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.job, self.device = job, (environment or {}).get("CUDA_VISIBLE_DEVICES")
        self._run, self._arguments = run, list(arguments)
        self._environment, self._threads = environment, threads
        self._outcomes: list[TrialOutcome] = []
        self._stopped: Literal["pruned", "timeout"] | None = None
        self._told = 0
        self._ending = False
        job.prepare()
        self._process = self._start()

    def poll(self) -> TrialOutcome | None:
        """Return how it ended; begin the next seed if there is one."""
        code = self._process.poll()
        if code is None:
            limit = self.job.time_limit_seconds
            if limit is not None and self._stopped is None and self._process.seconds > limit:
                self._stopped = "timeout"
                self._process.kill()  # what hangs does not hear anything gentler
            return None
        folder = self.job.run_folder(len(self._outcomes))
        ending = Ending(code, self._stopped, self._process.seconds)
        outcome = outcome_of(folder, ending, self.job.budget_bytes, self.job.metric, self.job.data)
        self._outcomes.append(outcome)
        if self._ending and len(self._outcomes) < len(self.job.seeds):
            return replace(outcome, kind=Outcome.killed, error="stopped between two seeds")
        if outcome.kind is not Outcome.completed or len(self._outcomes) == len(self.job.seeds):
            return combined(self._outcomes, self.job.seeds)
        self._process = self._start()
        return None

    def epochs(self) -> list[tuple[int, float]]:
        """Return what the run wrote beside its checkpoints."""
        folder = self.job.run_folder(len(self._outcomes)) / CHECKPOINTS
        try:
            stored = json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8"))
            epoch = int(stored["epoch"])
            value = next(stored[name] for name in stored if name.startswith("val/"))
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            return []
        if value is None or epoch <= self._told or not math.isfinite(value):
            return []
        self._told = epoch
        return [(epoch, float(value))]

    def stop(self, why: Stop) -> None:
        """Ask the process to save and end."""
        if why == "pruned":
            self._stopped = self._stopped or "pruned"
        else:
            self._ending = True  # also if this seed has just come to its end
        self._process.stop(signal.SIGTERM if why == "pruned" else signal.SIGINT)

    def kill(self) -> None:
        """Kill the process and all it started."""
        self._process.kill()

    def _start(self) -> TrialProcess:
        index = len(self._outcomes)
        folder = self.job.run_folder(index)
        lines = [*self.job.run_lines(index), setting("hydra.run.dir", folder)]
        return TrialProcess(
            self._run, [*self._arguments, *lines], folder, self._environment, self._threads
        )


@dataclass
class ProcessRunner:
    """Starts trials as processes, each on the device with the fewest of them.

    Args:
        run: runs a command line.
        arguments: of every command line, like ``--config-dir=FOLDER``.
        devices: names of CUDA devices; with fewer than two nothing is chosen.
        threads: of torch, for each process; None leaves it to torch.

    """

    run: RunLine
    arguments: Sequence[str] = ()
    devices: Sequence[str] = ()
    threads: int | None = None
    prunes: bool = True
    _busy: list[ProcessTrial] = field(default_factory=list)

    def start(self, job: Job) -> ProcessTrial:
        """Start a trial."""
        environment = {}
        if len(self.devices) > 1:
            self._busy = [trial for trial in self._busy if trial._process._process.is_alive()]
            taken = [trial.device for trial in self._busy]
            device = min(self.devices, key=taken.count)
            environment = {"CUDA_VISIBLE_DEVICES": device}
        trial = ProcessTrial(job, self.run, self.arguments, environment, self.threads)
        self._busy.append(trial)
        return trial

    def flush(self) -> None:
        """Do nothing: trials start at once."""


def combined(outcomes: Sequence[TrialOutcome], seeds: Sequence[int]) -> TrialOutcome:
    """Return one outcome for the runs of all seeds: the last if it is bad, else their mean."""
    last = outcomes[-1]
    seconds = sum(outcome.seconds for outcome in outcomes)
    if len(seeds) == 1 or last.kind is not Outcome.completed:
        return replace(last, seconds=seconds)
    values = [outcome.value for outcome in outcomes if outcome.value is not None]
    peaks = [outcome.peak_bytes for outcome in outcomes if outcome.peak_bytes is not None]
    demands = [outcome.demand_bytes for outcome in outcomes if outcome.demand_bytes is not None]
    events = sum(outcome.extra.get("oom_events", 0) for outcome in outcomes)
    return replace(
        last,
        value=statistics.fmean(values),
        peak_bytes=max(peaks, default=None),
        demand_bytes=max(demands, default=None),
        seconds=seconds,
        run_id=None,
        extra={
            **last.extra,
            **({"oom_events": events} if events else {}),
            "values_by_seed": {str(seed): value for seed, value in zip(seeds, values, strict=True)},
            "spread": statistics.stdev(values),
        },
    )
