"""Two pictures of a study, for its parent run: the search over time, and error against memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from expt.config.search_node import MAE
from expt.files import replace_atomically
from expt.result import load_result
from expt.search.trial import KIND
from expt.search.winner import best_trial, feasible, pareto, peak_of
from expt.units import GIB, MIB

FOLDER = "plots"
INSIDE, OUTSIDE, BEST = "#2b6cb0", "#a0aec0", "#c05621"


def draw(study: Study, budget_bytes: int | None, folder: Path) -> list[Path]:
    """Write ``history.png`` and ``memory.png``; none if no trial came to a figure."""
    trials = study.get_trials(deepcopy=False)
    done = [
        trial
        for trial in trials
        if trial.state is TrialState.COMPLETE and trial.user_attrs.get(KIND) != "duplicate"
    ]
    if not done:
        return []
    limited, name, error = budget_bytes is not None, study.study_name, _error_label(folder)
    return [
        _save(_history(done, limited, name, error), folder / FOLDER / "history.png"),
        _save(_memory(done, budget_bytes, name, error), folder / FOLDER / "memory.png"),
    ]


def _error_label(folder: Path) -> str:
    """Return the error with its unit, as the first trial that has a record says."""
    results = (load_result(path.parent) for path in sorted(folder.glob("trial_*/**/result.json")))
    unit = next((result.unit for result in results if result is not None), None)
    return f"{MAE} ({unit})" if unit else MAE


def _history(done: list[FrozenTrial], limited: bool, name: str, error: str) -> Figure:
    """Draw the error of every trial, and the best inside the budget so far."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for inside, colour, label in ((True, INSIDE, "in the budget"), (False, OUTSIDE, "above it")):
        shown = [trial for trial in done if feasible(trial, limited) is inside]
        if shown:
            axes.scatter(
                [t.number for t in shown], [t.values[0] for t in shown], s=18, c=colour, label=label
            )
    numbers, values = [], []
    best = float("inf")
    for trial in done:
        if feasible(trial, limited) and trial.values[0] < best:
            best = trial.values[0]
        if best < float("inf"):
            numbers.append(trial.number)
            values.append(best)
    axes.step(numbers, values, where="post", color=BEST, linewidth=1.4, label="best so far")
    axes.set(xlabel="trial", ylabel=error, title=f"{name}: the search")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def _memory(done: list[FrozenTrial], budget_bytes: int | None, name: str, error: str) -> Figure:
    """Draw error against measured peak, the front of what no other trial beats, the budget."""
    known = [(trial, peak) for trial in done if (peak := peak_of(trial)) is not None]
    unit, factor = ("GiB", GIB) if max((p for _, p in known), default=0) > GIB / 2 else ("MiB", MIB)
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    limited = budget_bytes is not None
    for inside, colour in ((True, INSIDE), (False, OUTSIDE)):
        shown = [(trial, peak) for trial, peak in known if feasible(trial, limited) is inside]
        if shown:
            peaks = [peak / factor for _, peak in shown]
            axes.scatter(peaks, [t.values[0] for t, _ in shown], s=18, c=colour)
    front = pareto(done, limited)
    if front:
        axes.step(
            [(peak_of(trial) or 0) / factor for trial in front],
            [trial.values[0] for trial in front],
            where="post", color=INSIDE, linewidth=1.2, label="no trial is better in both",
        )  # fmt: skip
    best = best_trial(done, limited)
    if best is not None and peak_of(best) is not None:
        axes.scatter(
            [(peak_of(best) or 0) / factor], [best.values[0]], s=70, facecolors="none",
            edgecolors=BEST, linewidths=1.6, label=f"best: trial {best.number}",
        )  # fmt: skip
    if budget_bytes is not None:
        axes.axvline(budget_bytes / factor, color="black", linestyle="--", linewidth=1)
        axes.annotate("budget", (budget_bytes / factor, 0.97), xycoords=("data", "axes fraction"),
                      rotation=90, va="top", ha="right", fontsize=8)  # fmt: skip
    axes.set(xlabel=f"peak memory ({unit})", ylabel=error, title=f"{name}: what it costs")
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    replace_atomically(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=150), durable=False
    )
    return path
