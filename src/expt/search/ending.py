"""From what a trial's process left behind to what became of the trial."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expt.job import Metric
from expt.result import FILE_NAME, Outcome, RunResult, load_result
from expt.run.process import LOG_NAME, kill_leftover
from expt.search.metric import mismatch
from expt.search.trial import TrialOutcome
from expt.tracking.journal import State

LOG_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit code (negative: a signal's number), and whether we ended it."""

    exit_code: int
    stopped: Literal["pruned", "timeout"] | None = None
    seconds: float = 0.0


def outcome_of(
    folder: Path,
    ending: Ending,
    budget_bytes: int | None,
    metric: Metric | None = None,
    data: str | None = None,
) -> TrialOutcome:
    """Classify the run in a trial's folder.

    Args:
        folder: with ``result.json``, if it came to that, and ``output.log``.
        ending: of its process.
        budget_bytes: the limit, None without one.
        metric: that trials are compared by; a run that monitored another one is refused.
        data: the fingerprint of those that trials share, None where it is not known; a run on
            others is refused.

    """
    result = load_result(folder)
    state = State.load(folder)
    run_id = state.run_id if state else None
    if result is None:
        return _without_result(folder, ending, run_id)
    known = _measured(result, ending, run_id)
    if result.oom_events:
        known["extra"] = {"oom_events": len(result.oom_events)}
    value = result.value()
    ended = result.outcome
    if ended is Outcome.completed:
        other = None if metric is None else mismatch(result.metric(), metric)
        own = result.data_fingerprint
        if None not in (data, own) and own != data:
            other = f"its data are others (fingerprint {own}, and of the search {data})"
        if other is not None:
            return TrialOutcome(Outcome.refused, error=other, **known)
        if value is None or not math.isfinite(value):
            error = f"the validation {result.metric().label} is not a number"
            return TrialOutcome(Outcome.diverged, error=error, **known)
        demand = known["demand_bytes"]
        over = budget_bytes is not None and demand is not None and demand > budget_bytes
        kind = Outcome.over_budget if over else Outcome.completed
        return TrialOutcome(kind, value=value, **known)
    if ending.stopped == "timeout":
        return TrialOutcome(Outcome.timeout, error=_too_long(ending), **known)
    if ending.stopped == "pruned":
        return TrialOutcome(Outcome.pruned, **known)
    if ended is Outcome.out_of_memory:
        found = _excess_bytes(result.oom_events)
        # What was measured is what did fit, and says nothing about what did not.
        known |= {"peak_bytes": None, "demand_bytes": None}
        return TrialOutcome(ended, excess_bytes=found, error="memory ran out", **known)
    if ended is Outcome.diverged:
        return TrialOutcome(ended, error="the loss is not finite", **known)
    if ended is Outcome.stopped:
        error = f"stopped by a signal ({ending.exit_code})"
        return TrialOutcome(Outcome.killed, error=error, **known)
    return TrialOutcome(ended, error=_short(result.stop_reason), **known)


def set_aside(folder: Path) -> int:
    """Rename the result of an earlier attempt, unless it is complete; return how many there are."""
    earlier = len(list(folder.glob("result.attempt_*.json")))
    result = load_result(folder)
    if result is not None and result.status != "completed":
        earlier += 1
        (folder / FILE_NAME).rename(folder / f"result.attempt_{earlier}.json")
    return earlier


def move_aside(folder: Path) -> Path | None:
    """Rename a folder that is there although its trial was never started; return where it is now.

    It is of another study, as where a storage was set back to a copy of earlier times.
    """
    if not folder.exists():
        return None
    for path in (folder, *folder.glob("seed_*")):
        kill_leftover(path)
    names = (folder.with_name(f"aside_{folder.name}_{number}") for number in itertools.count(1))
    return folder.rename(next(path for path in names if not path.exists()))


def _without_result(folder: Path, ending: Ending, run_id: str | None) -> TrialOutcome:
    seconds, code = ending.seconds, ending.exit_code
    said = _last_words(folder)
    if ending.stopped == "timeout":
        return TrialOutcome(
            Outcome.timeout, seconds=seconds, error=_too_long(ending), run_id=run_id
        )
    if ending.stopped == "pruned":
        return TrialOutcome(Outcome.pruned, seconds=seconds, run_id=run_id)
    if code == 2:
        return TrialOutcome(Outcome.refused, seconds=seconds, error=said, run_id=run_id)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = ", perhaps for lack of host memory" if -code == signal.SIGKILL else ""
        error = f"killed by {name}{hint}"
        return TrialOutcome(Outcome.killed, seconds=seconds, error=error, run_id=run_id)
    error = said or f"it ended with exit code {code} and left no result"
    return TrialOutcome(Outcome.failed, seconds=seconds, error=error, run_id=run_id)


def _measured(result: RunResult, ending: Ending, run_id: str | None) -> dict[str, Any]:
    peak = result.memory.get("peak_allocated_bytes")
    reserved = result.memory.get("peak_reserved_bytes")
    return {
        "peak_bytes": peak,
        "demand_bytes": peak if reserved is None else reserved,
        "seconds": max(result.seconds, ending.seconds),
        "run_id": result.tracking.get("run_id") or run_id,
    }


def _excess_bytes(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Return what was missing at the last failure that says so: asked for, less what was free."""
    for event in reversed(events):
        asked, free = event.get("bytes_requested"), event.get("bytes_free")
        if asked is not None and free is not None:
            return max(int(asked) - int(free), 1)
    return None


def _too_long(ending: Ending) -> str:
    return f"it took more than search.trial_time_limit_seconds ({ending.seconds:.0f} s)"


def _last_words(folder: Path) -> str | None:
    """Return the last line of a process's output that says something."""
    try:
        with (folder / LOG_NAME).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - LOG_TAIL_BYTES, 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    said = [line.strip() for line in lines if line.strip()]
    wrong = [line for line in said if line.startswith("error: ")]
    return _short(wrong[-1].removeprefix("error: ") if wrong else said[-1]) if said else None


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
