"""What a search adds to its trials: seconds per trial, and per suggestion in a long study.

A search of short trials is run; what passes between the ends of two trials, less the time of the
trial's process, is what the search adds: suggestion, prediction, telling, records. Then a study
gets 10,000 told trials, and a suggestion by Optuna alone is compared with one by the search, which
also counts, looks for duplicates and signs the trial.

    python benchmarks/sweep_overhead.py [--again]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from common import kept, markdown, provenance, source_line, store
from optuna.trial import TrialState

from expt.result import load_result
from expt.search.reservation import Reservations
from expt.search.space import Space
from expt.search.trial import KIND

NAME = "sweep_overhead"
TRIALS, TOLD, ASKED = 24, 10_000, 5


def per_trial(folder: Path) -> dict[str, Any]:
    """Run a search of short trials and return the seconds that it adds to each."""
    subprocess.run(
        [
            sys.executable, "-m", "expt", "-m", "search=debug", f"search.n_trials={TRIALS}",
            "search.presets=[]", "memory.budget=1GiB", "search.test_winner=false",
            "model.num_stages=1",
        ],
        cwd=folder, env=dict(os.environ), check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"sqlite:///{folder}/outputs/optuna.db"
    trials = optuna.load_study(study_name="debug", storage=url).trials
    added: dict[bool, list[float]] = {True: [], False: []}
    starting, training = [], []
    for before, trial in pairwise(trials):
        assert before.datetime_complete is not None and trial.datetime_complete is not None
        between = (trial.datetime_complete - before.datetime_complete).total_seconds()
        process = trial.user_attrs["seconds"]
        result = load_result(Path(trial.user_attrs["run_dir"]))
        assert result is not None
        added[bool(trial.user_attrs.get("recalled"))].append(between - process)
        starting.append(process - result.seconds)
        training.append(result.seconds)
    every = [*added[True], *added[False]]
    return {
        "trials": len(every),
        "search_adds_seconds": round(statistics.median(every), 3),
        "search_adds_seconds_worst": round(max(every), 3),
        "predictions_kept": len(added[True]),
        "search_adds_seconds_where_kept": _median(added[True]),
        "search_adds_seconds_where_made": _median(added[False]),
        "process_beside_training_seconds": round(statistics.median(starting), 3),
        "training_seconds": round(statistics.median(training), 3),
    }


def _median(seconds: list[float]) -> float | None:
    return round(statistics.median(seconds), 3) if seconds else None


def per_suggestion(folder: Path) -> dict[str, Any]:
    """Return the seconds of a suggestion after 10,000 told trials, alone and within a search."""
    space = Space.parse({"x": "interval(0.0,1.0)", "lr": "tag(log,interval(1e-4,1e-1))",
                         "width": "choice(8,16,32,64)"})  # fmt: skip
    storage = optuna.storages.InMemoryStorage()  # a database would take minutes to be filled
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(study_name="long", storage=storage, sampler=sampler)
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={"x": index / TOLD, "lr": 1e-3, "width": 8 << index % 4},
                distributions=dict(space.distributions),
                value=1.0 + index % 7,
                user_attrs={KIND: "completed"},
                constraints={"peak_memory": -0.1},
            )
            for index in range(TOLD)
        ]
    )
    door = Reservations(study, space, 2 * TOLD, folder)
    alone, within = [], []
    for _ in range(ASKED):
        started = time.perf_counter()
        trial = study.ask(dict(space.distributions))
        alone.append(time.perf_counter() - started)
        study.tell(trial, state=TrialState.FAIL)
        started = time.perf_counter()
        reserved = door.next()
        within.append(time.perf_counter() - started)
        assert not isinstance(reserved, str)
        study.tell(reserved.trial, state=TrialState.FAIL)
    return {
        "told": TOLD,
        "optuna_alone_seconds": round(statistics.median(alone), 3),
        "within_the_search_seconds": round(statistics.median(within), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="also if a result is stored")
    if kept(NAME, parser.parse_args().again):
        return
    with tempfile.TemporaryDirectory() as folder:
        trial = per_trial(Path(folder))
        suggestion = per_suggestion(Path(folder))
    result = {
        "made": provenance(),
        "per_trial": trial,
        "per_suggestion": suggestion,
        "load_average": round(os.getloadavg()[0], 1),
    }
    rows = [
        ["the search adds to a trial, beside its process", f"{trial['search_adds_seconds']:.2f} s"],
        ["… the most, of {trials} trials".format(**trial),
         f"{trial['search_adds_seconds_worst']:.2f} s"],
        ["… where its peak was predicted, {} trials".format(
            trial["trials"] - trial["predictions_kept"]),
         f"{trial['search_adds_seconds_where_made'] or 0:.2f} s"],
        ["… where the prediction was kept from another, {predictions_kept} trials".format(**trial),
         f"{trial['search_adds_seconds_where_kept'] or 0:.2f} s"],
        ["a trial's process, beside its training",
         f"{trial['process_beside_training_seconds']:.2f} s"],
        [f"a suggestion after {TOLD:,} trials, Optuna alone",
         f"{suggestion['optuna_alone_seconds']:.2f} s"],
        ["… within the search", f"{suggestion['within_the_search_seconds']:.2f} s"],
    ]  # fmt: skip
    store(NAME, result, markdown(["", "time"], rows) + "\n" + source_line(result, NAME))
    print(markdown(["", "time"], rows))


if __name__ == "__main__":
    main()
