"""Which search has the better model after the same wall time: ours, or the stock sweeper's.

    python benchmarks/sweep_race.py [--minutes 8] [--seeds 0 1 2 3 4] [--sides ours …] [--smoke]

Three searches for the same, each trial under the same enforced `memory.budget`, each for the same
minutes from the start of its process, one after the other on an idle machine. What is learned is
varied by all of them (`LEARNED`); the techniques that make a trial fit are chosen by a plan in ours
(`memory.on_overflow=adapt`), and varied as well by the stock sweeper (`TECHNIQUES`).

``ours``            ``hydra/sweeper=expt``, trials side by side, Optuna's Gaussian process
``stock``           ``hydra/sweeper=optuna``, ``max_failure_rate=1``: what memory is not enough for
                    has failed, and the sampler is told nothing
``stock, patched``  the same, and what memory is not enough for returns a bad value

Of each trial is kept when it ended, its validation error, and whether it was inside the budget.
A side of a seed that is finished is kept in outputs/benchmarks/sweep_race and in the result; one
that was cut is run again from its start. `--smoke` takes one trial of each side and stores nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, load, markdown, provenance, source_line, stamped, store
from sweep_searches import SPACE, Clock, row_of, spans_of, states_of, stock_kind, trials_of

from expt.files import replace_atomically
from expt.result import Outcome
from expt.search.trial import KIND, STARTED
from expt.units import parse_bytes

NAME = "sweep_race"
BUDGET = "48MiB"
OURS, STOCK, PATCHED = SIDES = ("ours", "stock", "stock, patched")
SHARED = (
    "data=metr_la_29", "data.eval_batch_size=64", "model.patch_sizes=[1]",
    "trainer.progress=false", "trainer.test=false", "tracking=none", "memory.recover=false",
)  # fmt: skip
SIZES = {
    False: ("trainer.epochs=4", "trainer.steps_per_epoch=30", "trainer.eval_batches=20"),
    True: ("trainer.epochs=1", "trainer.steps_per_epoch=2", "trainer.eval_batches=1"),
}
LEARNED = {name: text for name, text in SPACE.items() if not name.startswith("memory.")}
TECHNIQUES = {
    "memory.activation_checkpointing": "choice(false,true)",
    "memory.gradient_accumulation": "choice(1,2,4,8)",
    "memory.forward_chunks": "choice(1,2,4)",
}
OURS_GIVEN = (
    "memory.on_overflow=adapt", "hydra/sweeper/sampler=gp",
    "hydra.sweeper.sampler.n_startup_trials=5", "search.n_jobs=auto",
)  # fmt: skip
"""Where most points fit, the error is a smooth function of few settings, which a Gaussian process
learns from few trials. The stock sweeper keeps its own sampler, TPE: what its patch returns for a
lack of memory is a cliff."""
BAD_VALUE = "100"
"""What the patch returns; no error in mph is as large."""
NO_END = 100_000
PARTS = 3
"""The standings are read at each third of the time."""
COLOURS = {OURS: "#0072B2", STOCK: "#D55E00", PATCHED: "#E69F00"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--smoke", action="store_true", help="a trial each, nothing is stored")
    parser.add_argument("--folder", type=Path, help="where the searches are kept")
    given = parser.parse_args(arguments)
    home = given.folder or ROOT / "outputs" / "benchmarks" / NAME
    record: dict[str, Any] = {} if given.smoke else load(NAME)
    if record.get("minutes", given.minutes) != given.minutes:
        raise SystemExit(f"{NAME}.json is of {record['minutes']} minutes; move it away first")
    sides = {"space": LEARNED, "techniques": TECHNIQUES, "ours": list(OURS_GIVEN)}
    if record and any(record.get(name) != one for name, one in sides.items()):
        raise SystemExit(f"{NAME}.json is of another space or search; move it away first")
    seeds = [0] if given.smoke else given.seeds
    record |= {"minutes": given.minutes, "budget_bytes": parse_bytes(BUDGET), **sides}
    record["settings"] = [*SHARED, *SIZES[given.smoke], f"memory.budget={BUDGET}"]
    runs = record.setdefault("runs", {})
    for seed in seeds:
        own = runs.setdefault(str(seed), {})
        for side in SIDES:
            if side in own or side not in given.sides:
                continue
            folder = home / f"seed_{seed}" / side.replace(", ", "_")
            before = round(os.getloadavg()[0], 1)
            rows = search(side, folder, record["settings"], seed, given.minutes, given.smoke)
            own[side] = stamped({"rows": rows, "load_average_before": before})
            record["made"] = provenance()
            print(f"seed {seed}, {side}: {told(rows)}", flush=True)
            if not given.smoke:
                store(NAME, record, tables(record))
                plot(record, RESULTS / f"{NAME}.png")
    print(tables(record))
    if given.smoke:
        plot(record, home / f"{NAME}.png")


def search(
    side: str, folder: Path, lines: Sequence[str], seed: int, minutes: float, smoke: bool
) -> list[dict[str, Any]]:
    """Run one side for its time, from nothing, and return what became of its trials, in order."""
    if folder.exists():
        shutil.rmtree(folder)  # it was cut
    folder.mkdir(parents=True)
    command = _ours(folder, lines, seed) if side == OURS else _stock(folder, lines, seed)
    database = folder / "outputs" / "optuna.db" if side == OURS else folder / "stock.db"
    variables = {"STOCK_BAD_VALUE": BAD_VALUE} if side == PATCHED else {}
    with Clock(folder, "race") as clock:
        over: Callable[[], bool] = lambda: time.time() - clock.begun > 60 * minutes  # noqa: E731
        if smoke:
            over = lambda: "COMPLETE" in states_of(database)  # noqa: E731
        clock.run(command, folder, over, variables)
    spans = spans_of(folder, "race")
    trials = trials_of(database, "ours" if side == OURS else "stock")
    rows = []
    for trial in sorted(
        (t for t in trials if t.datetime_complete), key=lambda t: t.datetime_complete
    ):
        if side != OURS:
            kind, peak = stock_kind(folder, trial)
        elif STARTED in trial.user_attrs:
            kind, peak = trial.user_attrs[KIND], trial.user_attrs.get("peak_bytes")
        else:
            continue
        row = row_of(trial, kind, peak, spans)
        trained = Outcome.parse(kind) is Outcome.completed
        row |= {"val_mae": row["val_mae"] if trained else None, "in_budget": trained}
        rows.append(row)
    return rows


def _ours(folder: Path, lines: Sequence[str], seed: int) -> list[str]:
    settings = {"study": "ours", "n_trials": NO_END, "seed": seed, "test_winner": False,
                "space": LEARNED}  # fmt: skip
    own = folder / "own" / "search" / "benchmark.yaml"
    own.parent.mkdir(parents=True)
    head = "# @package _global_\ndefaults:\n  - override /hydra/sweeper: expt\n"
    own.write_text(f"{head}search: {json.dumps(settings)}\n", encoding="utf-8")
    given = [f"--config-dir={folder / 'own'}", "-m", "search=benchmark", *OURS_GIVEN]
    return ["-m", "expt", *given, *lines]


def _stock(folder: Path, lines: Sequence[str], seed: int) -> list[str]:
    return [
        str(Path(__file__).with_name("stock_objective.py")), "-m", "hydra/sweeper=optuna", *lines,
        "memory.plan=false", "hydra.sweeper.direction=minimize", "hydra.sweeper.max_failure_rate=1",
        "hydra.sweeper.n_jobs=1", f"hydra.sweeper.n_trials={NO_END}",
        f"hydra.sweeper.sampler.seed={seed}", "hydra.sweeper.study_name=stock",
        f"hydra.sweeper.storage='sqlite:///{folder / 'stock.db'}'",
        f"hydra.sweep.dir='{folder / 'stock_000'}'",
        *(f"{name}={text}" for name, text in {**LEARNED, **TECHNIQUES}.items()),
    ]  # fmt: skip


def best_by(rows: Sequence[Mapping[str, Any]], seconds: float) -> float | None:
    """Return the smallest error of what had been trained in the budget by then."""
    done = [row["val_mae"] for row in rows if row["in_budget"] and row["at_seconds"] <= seconds]
    return min(done, default=None)


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what a side came to, in a line."""
    best = best_by(rows, float("inf"))
    figure = "nothing" if best is None else f"{best:.3f} mph"
    return f"{figure}, {sum(row['in_budget'] for row in rows)} of {len(rows)} trials trained"


def wasted(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many trials were started and ran out of memory."""
    return sum(Outcome.parse(row["kind"]).columns.over for row in rows)


def tables(record: Mapping[str, Any]) -> str:
    """Return the page's table: the best error at each third of the time, and who was ahead."""
    minutes, runs = record["minutes"], record["runs"]
    marks = [minutes * part / PARTS for part in range(1, PARTS + 1)]
    columns = ["search", "seeds", *(f"after {mark:.3g} min" for mark in marks)]
    columns += ["ours ahead at the end", "trials started", "wasted"]
    rows = []
    for side in SIDES:
        known = {seed: own[side]["rows"] for seed, own in runs.items() if side in own}
        if not known:
            continue
        started = [len(one) for one in known.values()]
        lost = sum(map(wasted, known.values()))
        cells = [_spread([best_by(one, 60 * mark) for one in known.values()]) for mark in marks]
        both = [seed for seed in known if OURS in runs[seed]]
        ahead = sum(_ahead(runs[seed], side, 60 * minutes) for seed in both)
        rows.append(
            [
                side,
                str(len(known)),
                *cells,
                "" if side == OURS else f"{ahead} of {len(both)}",
                f"{statistics.median(started):g}",
                f"{lost / max(sum(started), 1):.0%}",
            ]
        )
    note = (
        f"Best validation MAE (mph) inside an enforced budget of {BUDGET}: the median over seeds, "
        "and the smallest and largest. Trials started: the median. Wasted: started, and out of "
        "memory. Time runs from the start of the search's process. "
    )
    return markdown(columns, rows) + "\n" + note + source_line(record, NAME)


def _spread(found: Sequence[float | None]) -> str:
    known = sorted(one for one in found if one is not None)
    if len(known) < len(found):
        return f"{len(found) - len(known)} of {len(found)} had none"
    return f"{statistics.median(known):.3f} ({known[0]:.3f} to {known[-1]:.3f})"


def _ahead(sides: Mapping[str, Any], other: str, seconds: float) -> bool:
    """Tell whether ours had the smaller error; what has none is behind."""
    ours, theirs = (best_by(sides[side]["rows"], seconds) for side in (OURS, other))
    return ours is not None and (theirs is None or ours < theirs)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw each side's median over the seeds against wall time, between the best and the worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    minutes = record["minutes"]
    times = [minutes * step / 480 for step in range(481)]
    shown: list[float] = []
    for side in SIDES:
        known = [own[side]["rows"] for own in record["runs"].values() if side in own]
        if not known:
            continue
        curves = [[best_by(rows, 60 * at) for at in times] for rows in known]
        # From where every seed has a figure.
        points = [
            (at, statistics.median(values), min(values), max(values))
            for at, values in zip(times, zip(*curves, strict=True), strict=True)
            if None not in values
        ]
        if not points:
            continue
        x, middle, low, high = zip(*points, strict=True)
        shown += middle
        count = f"{len(known)} seed{'s' if len(known) > 1 else ''}"
        axes.step(x, middle, where="post", color=COLOURS[side], label=f"{side} ({count})")
        axes.fill_between(x, low, high, step="post", color=COLOURS[side], alpha=0.15, linewidth=0)
    for part in range(1, PARTS):
        axes.axvline(minutes * part / PARTS, color="#dddddd", linewidth=0.8, zorder=0)
    if shown:
        best, middle = min(shown), statistics.median(shown)
        reach = max(6 * (middle - best), 0.02 * best)
        axes.set_ylim(best - 0.15 * reach, min(best + reach, max(shown) + 0.1 * reach))
        axes.legend(frameon=False)
    axes.set(xlabel="wall time (min)", ylabel="best validation MAE so far (mph)", xlim=(0, minutes))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


if __name__ == "__main__":
    main()
