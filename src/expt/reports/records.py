"""`RunRecord`: one run or trial as a report sees it, wherever it was stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal[
    "completed",
    "over_budget",  # trained to its end, above the budget
    "out_of_memory",
    "predicted_over",  # predicted over the budget, and therefore never started
    "pruned",
    "failed",
    "stopped",
    "unfinished",  # running, or killed
]
KIND_STATES: Mapping[str, State] = {
    "complete": "completed",
    "infeasible_measured": "over_budget",
    "oom": "out_of_memory",
    "infeasible_predicted": "predicted_over",
    "pruned": "pruned",
    "crashed": "failed",
    "killed": "failed",
    "timeout": "failed",
    "nan": "failed",
    "refused": "failed",
}
"""From what a search calls the end of a trial; see `expt.search.trial`."""
NOT_SETTINGS = (
    "tracking", "hydra", "task", "replay", "diagnose", "fit", "cards", "expand", "report",
    "search", "trainer.resume", "trainer.progress", "trainer.test", "memory.plan_file",
)  # fmt: skip
"""Keys, and beginnings of keys, of a configuration that do not change what is trained."""


@dataclass(frozen=True)
class RunRecord:
    """One run; None is what is not known.

    `error` is the metric that is reported, the lower the better; `settings` are the flattened
    configuration as text, and `cwd` is where relative paths in it start; `started` is in seconds
    since the epoch; `detail` says what went wrong.
    """

    name: str
    state: State
    error: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    preset: str | None = None
    device: str | None = None
    precision: str | None = None
    meter: str | None = None
    predicted_peak_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    prediction_error: float | None = None
    budget_bytes: int | None = None
    seconds: float | None = None
    weights: int | None = None
    started: float = 0.0
    run_dir: str | None = None
    cwd: str | None = None
    run_id: str | None = None
    trial: int | None = None
    detail: str = ""

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

        What a search found to be over its own budget stays so, and is judged by what was measured
        if another one is asked about.
        """
        if self.state not in ("completed", "over_budget") or self.error is None:
            return False
        if self.state == "over_budget" and budget_bytes in (None, self.budget_bytes):
            return False
        if budget_bytes is None or self.demand_bytes is None:
            return self.state == "completed"
        return self.demand_bytes <= budget_bytes


@dataclass(frozen=True)
class RunSet:
    """The runs of a report in the order they were started, and where they are from.

    `notes` is what a reader has to know about what is not there; `space` maps the parameters of a
    study to Optuna's distributions, if the runs are its trials; `parameters` are their values by
    trial number, as the study has them.
    """

    records: tuple[RunRecord, ...]
    source: str
    notes: tuple[str, ...] = ()
    study: str | None = None
    space: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int | None:
        """The one budget that every run with an error had, None without such a one.

        Where no run has an error, it is the budget of them all.
        """
        judged = [r for r in self.records if r.error is not None] or self.records
        budgets = {r.budget_bytes for r in judged}
        return budgets.pop() if len(budgets) == 1 else None


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
    """Return the settings in which the runs differ, in the order of the configuration."""
    known = [record.settings for record in records if record.settings]
    names: dict[str, set[str]] = {}
    for settings in known:
        for name, value in settings.items():
            names.setdefault(name, set()).add(value)
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
STATES = {
    "completed": "completed",
    "over_budget": "over budget",
    "out_of_memory": "out of memory",
    "predicted_over": "predicted over",
    "pruned": "pruned",
    "failed": "failed",
    "stopped": "stopped",
    "unfinished": "unfinished",
}


def metric_header(metric: str) -> str:
    """Return ``val MAE`` for ``val/mae``, for the head of a column."""
    split, _, name = metric.rpartition("/")
    return f"{split} {name.upper() if len(name) <= 4 else name.replace('_', ' ')}".strip()


def metric_words(metric: str) -> str:
    """Return ``validation MAE`` for ``val/mae``."""
    split, _, name = metric.rpartition("/")
    return metric_header(f"{SPLITS.get(split, split)}/{name}")


def escaped(cell: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return cell.replace("|", "\\|")
