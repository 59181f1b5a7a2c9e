"""`RunRecord`: one run or trial as a report sees it, wherever it was stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from expt.config.schema import COMMAND_NODES, OPEN_GROUPS
from expt.job import Metric
from expt.result import Outcome

NOT_SETTINGS = (
    *sorted(COMMAND_NODES), "tracking", "hydra", "task", "fit", "search", "trainer.resume",
    "trainer.save_predictions", "trainer.progress", "trainer.test", "memory.plan_file",
)  # fmt: skip
"""Keys, and beginnings of keys, of a configuration that do not change what is trained."""
TARGETS = {f"{group}._target_" for group in OPEN_GROUPS}


@dataclass(frozen=True)
class RunRecord:
    """One run; None is what is not known.

    `value` is the figure that runs are ranked by (`ranked_by`), of what was trained to its end;
    `described` are the metrics by their bare names, and `monitor` is the one that decided which
    weights were best. `settings` are the flattened configuration as text, and `cwd` is where
    relative paths in it start; `predicted_demand_bytes` is what was compared with the budget before
    the run, with what an allocator reserves besides the peak; `started` and `ended` are in seconds
    since the epoch; `detail` says what went wrong.
    """

    name: str
    outcome: Outcome
    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    described: Mapping[str, Metric] = field(default_factory=dict)
    monitor: str = "mae"  # as all runs did before they said so
    fingerprint: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    preset: str | None = None
    device: str | None = None
    precision: str | None = None
    meter: str | None = None
    predicted_peak_bytes: int | None = None
    predicted_demand_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    prediction_error: float | None = None
    budget_bytes: int | None = None
    seconds: float | None = None
    weights: int | None = None
    started: float = 0.0
    ended: float | None = None
    run_dir: str | None = None
    cwd: str | None = None
    run_id: str | None = None
    trial: int | None = None
    detail: str = ""
    partial: Mapping[str, str] = field(default_factory=dict)
    """Splits of which only a part was evaluated, and how many samples."""

    @property
    def demand_bytes(self) -> int | None:
        """What a budget had to allow: reserved bytes where an allocator reserves."""
        reserved = self.peak_reserved_bytes
        return self.peak_allocated_bytes if reserved is None else reserved

    @property
    def model(self) -> str:
        """The model's class without its module, empty where it is not known."""
        return self.settings.get("model._target_", "").rpartition(".")[2]

    def fits(self, budget_bytes: int | None) -> bool:
        """Tell whether the run was trained to its end, inside the budget if there is one.

        A run without a figure does not: there is nothing to rank it by.
        """
        return self.outcome.trained and self.value is not None and self.is_inside(budget_bytes)

    def is_inside(self, budget_bytes: int | None) -> bool:
        """Tell whether the memory that the run took was inside the budget, if there is one.

        What a search found to be over its own budget stays so, and is judged by what was measured
        if another one is asked about.
        """
        over = self.outcome is Outcome.over_budget
        if over and budget_bytes in (None, self.budget_bytes):
            return False
        if budget_bytes is None or self.demand_bytes is None:
            return not over
        return self.demand_bytes <= budget_bytes


@dataclass(frozen=True)
class RunSet:
    """The runs of a report in the order they were started, and where they are from.

    `metric` is what they are ranked by, its name the key of the records, like ``val/mae``. `notes`
    is what a reader has to know about what is not there; `space` maps the parameters of a study to
    Optuna's distributions, if the runs are its trials; `parameters` are their values by trial
    number, as the study has them.
    """

    records: tuple[RunRecord, ...]
    source: str
    metric: Metric = field(default_factory=lambda: Metric("val/mae", label="MAE"))
    notes: tuple[str, ...] = ()
    study: str | None = None
    space: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int | None:
        """The one budget that every run with a figure had, None without such a one.

        Where no run has a figure, it is the budget of them all.
        """
        judged = [r for r in self.records if r.value is not None] or self.records
        budgets = {r.budget_bytes for r in judged}
        return budgets.pop() if len(budgets) == 1 else None


def of_seeds(runs: Sequence[RunRecord]) -> RunRecord:
    """Return the runs of a trial as one: mean figures, the largest peaks, the time of all."""
    first = runs[0]

    def common(of: Callable[[RunRecord], Mapping[str, Any]]) -> list[str]:
        return [name for name in of(first) if all(name in of(run) for run in runs)]

    def largest(peaks: Iterable[int | None]) -> int | None:
        return max((peak for peak in peaks if peak is not None), default=None)

    return replace(
        first,
        metrics={
            name: fmean(run.metrics[name] for run in runs)
            for name in common(lambda run: run.metrics)
            if name.partition("/")[0] in SPLITS
        },
        settings={
            name: first.settings[name]
            for name in common(lambda run: run.settings)
            if len({run.settings[name] for run in runs}) == 1
        },
        peak_allocated_bytes=largest(run.peak_allocated_bytes for run in runs),
        peak_reserved_bytes=largest(run.peak_reserved_bytes for run in runs),
        prediction_error=None,
        seconds=sum(run.seconds or 0.0 for run in runs),
    )


def with_prediction_error(record: RunRecord) -> RunRecord:
    """Return a record with the error of its prediction, where its two peaks are known."""
    predicted, peak = record.predicted_peak_bytes, record.peak_allocated_bytes
    if record.prediction_error is not None or predicted is None or not peak:
        return record
    return replace(record, prediction_error=predicted / peak - 1)


def labels(records: Sequence[RunRecord]) -> list[str]:
    """Return what to call runs: by their presets where that tells them apart, else by name."""
    presets = [record.preset for record in records]
    if len(set(presets)) == len(presets) and all(presets):
        return [str(preset) for preset in presets]
    names = [record.name.rpartition("/")[2] for record in records]
    return names if len(set(names)) == len(names) else [record.name for record in records]


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted keys and text, as a tracker has them."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def varied(records: Sequence[RunRecord]) -> list[str]:
    """Return the settings in which the runs differ, in the order of the configuration.

    One that a class was given in some runs only differs as well.
    """
    known = [record.settings for record in records if record.settings]
    names: dict[str, set[str | None]] = {}
    for settings in known:
        for name, value in settings.items():
            names.setdefault(name, set()).add(value)
    for group in OPEN_GROUPS:
        target = f"{group}._target_"
        # A trial that was never started knows its parameters alone.
        whole = [one for one in known if target in one and len(one.keys() & TARGETS) > 1]
        for name in names:
            if name.startswith(f"{group}."):
                given_to = {one[target] for one in whole if name in one}
                if any(one[target] in given_to and name not in one for one in whole):
                    names[name].add(None)
    return [
        name
        for name, values in names.items()
        if (len(values) > 1) and not _begins(name, NOT_SETTINGS)
    ]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted name, or all of it where two would be the same."""
    every = list(names)
    last = [name.rpartition(".")[2] for name in every]
    return {
        name: short if last.count(short) == 1 else name
        for name, short in zip(every, last, strict=True)
    }


def _begins(name: str, beginnings: Iterable[str]) -> bool:
    return any(name == own or name.startswith(f"{own}.") for own in beginnings)


SPLITS = {"val": "validation", "test": "test"}
MONITORED_ELSE = (
    "Some runs monitored {}; all are ranked by {}. report.metric=NAME ranks by another."
)


def ranked_by(runs: RunSet, given: str | None) -> RunSet:
    """Return the runs with their figures of a metric, like ``val/mae``; None: what they monitored.

    What the runs describe differently, they describe as most of those with the figure do.
    """
    records = runs.records
    name = given or _monitored(records)
    bare = name.rpartition("/")[2]
    known = [r for r in records if bare in r.described]
    ranked = [r for r in known if r.outcome.trained and name in r.metrics]
    described = Counter(r.described[bare] for r in ranked or known).most_common(1)
    metric = described[0][0] if described else Metric(bare, label=_label(bare))
    validated = [r for r in records if any(key.startswith("val/") for key in r.metrics)]
    others = sorted({f"val/{r.monitor}" for r in validated} - {name})
    if given is None and others:
        runs = replace(runs, notes=(*runs.notes, MONITORED_ELSE.format(", ".join(others), name)))
    return replace(
        runs,
        metric=replace(metric, name=name),
        records=tuple(
            replace(record, value=record.metrics.get(name) if record.outcome.trained else None)
            for record in records
        ),
    )


def metric_header(metric: Metric) -> str:
    """Return ``val MAE`` for ``val/mae``, for the head of a column."""
    return f"{metric.name.rpartition('/')[0]} {metric.label}".strip()


def metric_words(metric: Metric) -> str:
    """Return ``validation MAE`` for ``val/mae``."""
    split = metric.name.rpartition("/")[0]
    return f"{SPLITS.get(split, split)} {metric.label}".strip()


def metric_text(metric: Metric, value: float | None) -> str:
    """Return a figure for a table, without a unit but for per cent, empty for None."""
    return "" if value is None else metric.text(value, unit=metric.percent)


def _monitored(records: Sequence[RunRecord]) -> str:
    """Return the key of the metric that most runs monitored, of those with a figure of it."""
    names = [f"val/{record.monitor}" for record in records]
    known = [n for n, record in zip(names, records, strict=True) if n in record.metrics]
    return Counter(known or names).most_common(1)[0][0]


def _label(name: str) -> str:
    return name.upper() if len(name) <= 4 else name.replace("_", " ")
