"""The winner's test: the only time that a search looks at the test part, and only once."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial

from expt.errors import SearchError
from expt.interruption import Interruption, Stopped
from expt.results import PLAN_NAME
from expt.sweep.processes import LOG_NAME
from expt.sweep.reservation import Reservations
from expt.sweep.running import Job, Runner
from expt.sweep.trials import TrialOutcome
from expt.sweep.winner import TESTED, figures_of_test

POLL_SECONDS = 0.05


def run_test(
    study: Study,
    winner: FrozenTrial,
    reservations: Reservations,
    runner: Runner,
    lines: Sequence[str],
    folder: Path,
    seeds: Sequence[int],
) -> None:
    """Test the best weights of the winner's runs, unless a worker already did.

    The figures go into the study, as means over the seeds.

    Raises:
        Stopped: SIGINT or SIGTERM; the next worker tests.
        SearchError: the test went wrong; says why, and how to run it again.

    """
    number = str(winner.number)
    with reservations.locked():
        if number in study.user_attrs.get(TESTED, {}):
            return
        try:
            plan = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            plan = None
        job = Job(winner.number, lines, folder, seeds, plan, test=True)
        outcome = _run(runner, job)
        runs = [figures_of_test(job.run_folder(index)) for index in range(len(seeds))]
        if outcome.kind not in ("complete", "infeasible_measured") or not all(runs):
            raise _untested(winner, outcome, job)
        figures = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
        if len(runs) > 1:
            spread = statistics.stdev(run["test/mae"] for run in runs if "test/mae" in run)
            figures["test/mae_spread"] = spread
        study.set_user_attr(TESTED, {**study.user_attrs.get(TESTED, {}), number: figures})


def _untested(winner: FrozenTrial, outcome: TrialOutcome, job: Job) -> SearchError:
    if outcome.kind in ("complete", "infeasible_measured"):
        why = "its run left no test error"
    else:
        why = outcome.kind.replace("_", " ") + (f" ({outcome.error})" if outcome.error else "")
    logs = " and ".join(str(job.run_folder(n) / LOG_NAME) for n in range(len(job.seeds)))
    return SearchError(
        f"the best trial, {winner.number}, could not be tested: {why}; its output is in {logs}. "
        "Its validation error stands, and sweep.json has it. The same command again runs the test "
        "alone, search.test_winner=false does without"
    )


def _run(runner: Runner, job: Job) -> TrialOutcome:
    with Interruption() as interruption:
        running = runner.start(job)
        runner.flush()
        try:
            while (outcome := running.poll()) is None:
                if interruption.received is not None:
                    running.stop("signal")
                time.sleep(POLL_SECONDS)
        finally:
            running.kill()
        if interruption.received is not None:
            raise Stopped(interruption.received)
        return outcome
