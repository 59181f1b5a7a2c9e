"""Ours against the stock sweeper of Hydra and Optuna: the same search, the same enforced budget.

Both search the same space with the same sampler (TPE) and seed, on real traffic data, one trial
after the other, and every trial runs under the same enforced `memory.budget` without recovery
(`memory.recover=false`), so that what does not fit ends. Ours predicts each trial's peak and
tells the sampler by how much it is over; the stock sweeper (``max_failure_rate=1``, or it would
stop at the first) sees a failure, and has no plan (`memory.plan=false`): it could do nothing
with one. It is looked at twice: after as many trials as ours trained, and after as many have
been trained to their end, which takes it more of them.

    python benchmarks/sweep.py [--trials 30] [--seeds 0] [--smoke]

Resumable: what is finished is kept in outputs/benchmarks/sweep, and a search that was stopped
goes on; its time is then the sum of its parts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, load, markdown, provenance, source_line, stamped, store
from sweep_searches import SPACE, run_ours, run_stock

from expt.files import replace_atomically
from expt.result import Outcome
from expt.units import parse_bytes

NAME = "sweep"
BUDGET = "48MiB"
SHARED = (
    "data=metr_la_29", "data.eval_batch_size=64", "model.patch_sizes=[1]", "trainer.epochs=2",
    "trainer.progress=false", "trainer.test=false", "tracking=none", "memory.recover=false",
)  # fmt: skip
SIZES = {False: ("trainer.steps_per_epoch=60", "trainer.eval_batches=60"),
         True: ("trainer.steps_per_epoch=2", "trainer.eval_batches=1")}  # fmt: skip
OURS, STOCK, STOCK_TRAINED = "ours", "stock", "stock, as many trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--smoke", action="store_true", help="seconds a trial, nothing is stored")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"searches": {}} if arguments.smoke else load(NAME)
    record.setdefault("searches", {})
    for seed in arguments.seeds:
        name = f"{arguments.trials} trials, seed {seed}"
        folder = ROOT / "outputs" / "benchmarks" / ("sweep_smoke" if arguments.smoke else "sweep")
        found = compare(folder / name.replace(", ", "-").replace(" ", "_"), arguments, seed)
        record["searches"][name] = stamped({**found, "trials": arguments.trials, "seed": seed})
        record["made"] = provenance()
        record["load_average"] = round(os.getloadavg()[0], 1)
        print(tables(record))
        if not arguments.smoke:
            store(NAME, record, tables(record))
            plot(record)


def compare(folder: Path, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run both searches, or what is left of them, and return what is seen of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*SHARED, *SIZES[arguments.smoke], f"memory.budget={BUDGET}"]
    trials = arguments.trials
    ours = run_ours(folder, lines, trials, seed)
    stock = run_stock(folder, lines, trials, seed)
    return {
        "space": SPACE,
        "settings": lines,
        "budget_bytes": parse_bytes(BUDGET),
        "not_started": ours["not_started"],
        "sides": {
            OURS: figures(ours["rows"], trials),
            STOCK: figures(stock["rows"], trials),
            STOCK_TRAINED: figures(stock["rows"], nth_trained(stock["rows"], trials)),
        },
        "rows": {OURS: ours["rows"], STOCK: stock["rows"]},
    }


def figures(rows: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Return what the first `count` trials come to."""
    rows = rows[:count]
    trained = [row for row in rows if _kind(row) is Outcome.completed]
    wasted = [row for row in rows if _kind(row).columns.over]
    return {
        "launched": len(rows),
        "trained": len(trained),
        "wasted": len(wasted),
        "other": len(rows) - len(trained) - len(wasted),
        "wasted_share": round(len(wasted) / len(rows), 4),
        "best_val_mae": min((row["val_mae"] for row in trained), default=None),
        "seconds": rows[-1]["at_seconds"],
    }


def _kind(row: Mapping[str, Any]) -> Outcome:
    return Outcome.parse(row["kind"])  # also of rows that were recorded in the words of before


def nth_trained(rows: Sequence[Mapping[str, Any]], count: int) -> int:
    """Return how many trials were launched by the time that `count` were trained, or all."""
    trained = 0
    for index, row in enumerate(rows, 1):
        trained += _kind(row) is Outcome.completed
        if trained == count:
            return index
    return len(rows)


def tables(record: Mapping[str, Any]) -> str:
    """Return the page's table."""
    columns = ("search", "launched", "trained", "wasted", "best val MAE", "found after", "total")
    rows = []
    for name, search in record["searches"].items():
        for side, found in search["sides"].items():
            best = found["best_val_mae"]
            after = reached(search["rows"][OURS if side == OURS else STOCK], best)
            rows.append(
                (
                    side if len(record["searches"]) == 1 else f"{side} ({name})",
                    str(found["launched"]),
                    str(found["trained"]),
                    f"{found['wasted']} ({found['wasted_share']:.0%})",
                    "-" if best is None else f"{best:.3f}",
                    minutes(after),
                    minutes(found["seconds"]),
                )
            )
    searches = record["searches"].values()
    unlaunched = " and ".join(str(search["not_started"]) for search in searches)
    level = ", ".join(as_good_after(search) for search in searches)
    note = (
        f"TPE, the same space and seed, every trial under an enforced budget of {BUDGET}, no "
        f"recovery. Wasted: launched, and out of memory. Ours left {unlaunched} "
        "suggestions unlaunched, which were predicted not to fit, and was as good as the stock "
        f"search at its end after: {level}. "
        f"Load of the machine at the end: {record['load_average']}. "
    )
    return markdown(columns, rows) + "\n" + note + source_line(record, NAME)


def as_good_after(search: Mapping[str, Any]) -> str:
    """Return how long our search took to reach what the stock search had at its end."""
    best = search["sides"][STOCK_TRAINED]["best_val_mae"]
    if best is None:
        return "no trial of which was trained"
    return minutes(reached(search["rows"][OURS], best))


def reached(rows: Sequence[Mapping[str, Any]], error: float | None) -> float | None:
    """Return the seconds after which a search had an error this small, None if it never had."""
    for row in rows:
        if error is not None and _kind(row) is Outcome.completed and row["val_mae"] <= error:
            return float(row["at_seconds"])
    return None


def minutes(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds / 60:.1f} min"


def plot(record: Mapping[str, Any]) -> None:
    """Draw the best error so far against wall time, and the trials wasted; a panel per seed."""
    from matplotlib.figure import Figure

    searches = record["searches"]
    figure = Figure(figsize=(3 + 3.2 * len(searches), 3.8), layout="constrained")
    panels = figure.subplots(1, len(searches), sharey=True, squeeze=False)[0]
    for axes, (name, search) in zip(panels, searches.items(), strict=True):
        for color, (side, rows) in zip(("C0", "C1"), search["rows"].items(), strict=True):
            draw(axes, color, side, rows)
        axes.set(xlabel="wall time (min)", title=name if len(searches) > 1 else None)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("best validation MAE so far (mph)")
    panels[0].legend(frameon=False)
    path: Path = RESULTS / f"{NAME}.png"
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def draw(axes: Any, color: str, side: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one search."""
    times, best, crosses = [], [], []
    for row in rows:
        if _kind(row) is Outcome.completed:
            best.append(min([row["val_mae"], *best[-1:]]))
            times.append(row["at_seconds"] / 60)
        elif _kind(row).columns.over and best:
            crosses.append((row["at_seconds"] / 60, best[-1]))
    if best:
        times.append(rows[-1]["at_seconds"] / 60)
        best.append(best[-1])
    axes.step(times, best, where="post", color=color, linewidth=1.4, label=side)
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color=color, markersize=4, alpha=0.6,
                  label=f"{side}: out of memory")  # fmt: skip


if __name__ == "__main__":
    main()
