"""What a report says: from runs to the page's texts, figures and table."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from expt.job import Metric
from expt.reports.figures.claims import ABOUT_CLAIMS, Claim, claimed, plot_claims
from expt.reports.figures.excluded import excluded, plot_excluded
from expt.reports.figures.importance import Importance, importance, plot_importance
from expt.reports.figures.over_time import plot_over_time
from expt.reports.figures.prediction import accuracy, plot_prediction
from expt.reports.figures.progress import plot_progress
from expt.reports.figures.trade_off import best_run, front, plot_trade_off
from expt.reports.groups import Group, groups_by_data
from expt.reports.page import Card, Page, Picture
from expt.reports.records import RunRecord, RunSet, labels, metric_text, metric_words, varied
from expt.reports.run_table import Cells, ordered, run_table
from expt.result import Outcome
from expt.units import format_bytes, format_seconds

MOST_PROBLEMS = 12
MOST_GROUPS = 8
SEVERAL_DATA = (
    "The runs are on {} different data, and a figure on one says nothing about another. "
    "The best on each:"
)
MOST_SETTINGS = 6
"""Columns of settings in the page and on the console; runs.csv has all that differ."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a report: the budget to draw, claims, title, rows."""

    budget_bytes: int | None
    claims: Sequence[Claim]
    title: str | None
    rows: int
    command: str = ""


@dataclass(frozen=True)
class Contents:
    """A report in parts: its page, its files of figures, and the whole table.

    `best`, `pareto` and `importance` are of the first of `groups`, the data with the most runs;
    `best_of` is the best run of each group, by the group's name.
    """

    page: Page
    figures: Sequence[Path]
    table: Cells
    best: RunRecord | None
    pareto: Sequence[RunRecord]
    importance: Importance
    groups: Sequence[Group]
    best_of: Mapping[str, RunRecord | None]


def contents(runs: RunSet, wanted: Wanted, folder: Path) -> Contents:
    """Draw the figures into `folder` and put all parts together."""
    records, metric, budget = runs.records, runs.metric, wanted.budget_bytes
    groups = groups_by_data(runs)
    largest, several = groups[0], len(groups) > 1
    best_of = {group.name: best_run(group.records, metric, budget) for group in groups}
    best = best_of[largest.name]
    shares = importance(replace(runs, records=largest.records))
    on_data = f" Only runs on {largest.name}, {len(largest.records)} of {len(records)}."
    of_largest = on_data if several else ""
    best_of_all = front([r for r in largest.records if r.outcome.trained], metric)
    drawn = _drawn(
        replace(runs, records=largest.records), records, wanted, folder, shares, of_largest
    )
    rows = [record for group in groups for record in ordered(group.records, metric, budget)]
    data = {id(r): group.name for group in groups for r in group.records} if several else {}
    winners = [id(record) for record in best_of.values() if record is not None]
    # The settings that mattered first, then the others that differ.
    columns = list(dict.fromkeys([*shares.shares, *varied(largest.records), *varied(records)]))[
        :MOST_SETTINGS
    ]
    shown = rows[: wanted.rows]
    page = Page(
        title=wanted.title or (f"Search {runs.study}" if runs.study else "Runs compared"),
        subtitle=_subtitle(runs),
        lead=SEVERAL_DATA.format(len(groups)) if several else _lead(records, best, metric, budget),
        by_data=_by_data(groups, best_of, metric, budget),
        cards=_cards(records, best, metric, budget, largest.name if several else ""),
        pictures=[picture for own in drawn for picture in own.pictures()],
        table=run_table(shown, metric, wanted.claims, columns, data),
        table_words=_table_words(len(shown), len(rows), metric, several),
        marked=[n for n, record in enumerate(shown) if id(record) in winners],
        dimmed=[n for n, record in enumerate(shown) if not record.fits(budget)],
        missing=_missing(runs, shares, accuracy(records) is not None, of_largest),
        problems=_problems(records),
        footer=_footer(records),
        command=wanted.command,
    )
    table = run_table(rows, metric, wanted.claims, columns, data)
    files = [path for own in drawn for path in own.files]
    return Contents(page, files, table, best, best_of_all, shares, groups, best_of)


@dataclass(frozen=True)
class Drawn:
    """A figure's files, none where there is nothing to be seen, with its title and its words."""

    title: str
    files: Sequence[Path]
    words: str

    def pictures(self) -> list[Picture]:
        """Return what of it goes into the page."""
        return [
            Picture(self.title, path, self.words) for path in self.files if path.suffix == ".png"
        ]


def _drawn(
    compared: RunSet,
    every: Sequence[RunRecord],
    wanted: Wanted,
    folder: Path,
    shares: Importance,
    of_whom: str,
) -> list[Drawn]:
    """Draw all figures, in the order of the page.

    Args:
        compared: the runs on the same data.
        every: all runs, whose predictions may be compared.
        wanted: budget and claims.
        folder: where the figures go.
        shares: of the settings.
        of_whom: a sentence that says which runs are compared, empty where it is all of them.

    """
    records, metric, budget = compared.records, compared.metric, wanted.budget_bytes
    is_search = compared.study is not None
    inside = " inside the budget" if budget is not None else ""
    left_out = excluded(records, budget) if is_search else None
    told = accuracy(every)
    return [
        Drawn(
            "How soon it was how good",
            plot_over_time(records, metric, budget, folder) if is_search else [],
            f"The best {metric_words(metric)} so far{inside} against wall time; a point is a run "
            f"at its end, and pauses do not count.{of_whom}",
        ),
        Drawn(
            _against_memory(metric),
            plot_trade_off(records, metric, budget, folder),
            _front_words(front([r for r in records if r.outcome.trained], metric), metric, budget)
            + of_whom,
        ),
        Drawn(
            "What the budget excluded",
            plot_excluded(left_out, folder),
            "" if left_out is None else left_out.words() + of_whom,
        ),
        Drawn(
            "What mattered",
            plot_importance(shares, folder),
            f"Importance of each setting for being among the best tenth of {shares.runs} finished "
            f"runs (PED-ANOVA){f'; the study {compared.study}' if is_search else ''}.{of_whom}",
        ),
        Drawn(
            "Claimed, predicted, measured",
            plot_claims(claimed(every, wanted.claims), folder),
            "Peak memory by preset: what was claimed, what was predicted for these runs, and what "
            f"was measured. {ABOUT_CLAIMS}",
        ),
        Drawn(
            "How good the predictions were",
            plot_prediction(every, folder),
            (told.words() if told else "") + " The band holds half of the runs.",
        ),
        Drawn(
            "How the search went" if is_search else "Run after run",
            plot_progress(records, metric, budget, folder),
            f"The {metric_words(metric)} of every run in the order of starting, and the best so far"
            f"{inside}.{of_whom}",
        ),
    ]


def _by_data(
    groups: Sequence[Group],
    best_of: Mapping[str, RunRecord | None],
    metric: Metric,
    budget: int | None,
) -> list[str]:
    """Return the best run of each group in a line, nothing where there is one group."""
    if len(groups) == 1:
        return []
    found = []
    for group in groups[:MOST_GROUPS]:
        best, count = best_of[group.name], len(group.records)
        words = f"{group.name} ({count} run{'s' if count != 1 else ''}): "
        if best is None or best.value is None:
            inside = "" if budget is None else " inside the budget"
            without = _without(group.records, metric)
            found.append(words + (f"none {without}" if without else f"none finished{inside}"))
            continue
        peak = "" if best.demand_bytes is None else f", peak {format_bytes(best.demand_bytes)}"
        found.append(f"{words}{best.name}, {_said(metric, best.value)}{peak}")
    if len(groups) > MOST_GROUPS:
        found.append(f"… and {len(groups) - MOST_GROUPS} more data, in report.json")
    return found


def _lead(
    records: Sequence[RunRecord], best: RunRecord | None, metric: Metric, budget: int | None
) -> str:
    inside = "" if budget is None else f" inside the budget of {format_bytes(budget)}"
    if best is None or best.value is None:
        if without := _without(records, metric):
            return f"No run {without}."
        peaks = [r.demand_bytes or r.predicted_peak_bytes for r in records]
        known = [peak for peak in peaks if peak is not None]
        seen = f"; the smallest peak seen is {format_bytes(min(known))}" if known else ""
        return f"No run finished{inside}{seen}."
    name = labels(records)[list(records).index(best)]
    name += f" (run {best.name})" if name == best.preset else ""
    count = sum(record.value is not None for record in records)
    of = f"{count} runs with a result" if count < len(records) else f"{count} runs"
    text = f"The best of {of}{inside} is {name}: "
    if len(records) == 1:
        text = f"One run{inside}, {name}: "
    text += _said(metric, best.value)
    if best.demand_bytes is not None:
        text += f" at a peak of {format_bytes(best.demand_bytes)}"
        text += "" if budget is None else f", {best.demand_bytes / budget:.0%} of the budget"
    return text + "."


def _without(records: Sequence[RunRecord], metric: Metric) -> str:
    """Return what runs have in place of the metric, empty where one has it or none was trained."""
    trained = [record for record in records if record.outcome.trained]
    if not trained or any(record.value is not None for record in trained):
        return ""
    monitored = sorted({f"val/{record.monitor}" for record in trained})
    return f"has {metric.name}; they monitored {', '.join(monitored)}"


def _cards(
    records: Sequence[RunRecord],
    best: RunRecord | None,
    metric: Metric,
    budget: int | None,
    data: str,
) -> list[Card]:
    found = []
    on = f" on {data}" if data else ""
    if best is not None and best.value is not None:
        about = f"best {metric_words(metric)}{on}"
        found.append(Card(metric_text(metric, best.value), about, good=True))
        if best.demand_bytes is not None:
            found.append(Card(format_bytes(best.demand_bytes), "its peak memory"))
        test = f"test/{metric.name.rpartition('/')[2]}"
        if test in best.metrics and metric.name != test:
            tested = metric_text(metric, best.metrics[test])
            found.append(Card(tested, f"its test {metric.label}"))
    if budget is not None:
        found.append(Card(format_bytes(budget), "budget"))
    done = sum(record.value is not None for record in records)
    found.append(Card(f"{done} of {len(records)}", "runs with a result"))
    spared = sum(record.outcome is Outcome.predicted_over for record in records)
    if spared:
        found.append(Card(str(spared), "not run: predicted over budget"))
    told = accuracy(records)
    if told is not None:
        found.append(Card(f"{told.median:.2f} %", "median error of predicted peaks"))
    seconds = sum(record.seconds or 0.0 for record in records)
    found.append(Card(format_seconds(seconds), "training in all"))
    return found


def _against_memory(metric: Metric) -> str:
    return f"{metric.label[:1].upper()}{metric.label[1:]} against memory"


def _said(metric: Metric, value: float) -> str:
    return f"{metric_words(metric)} {metric_text(metric, value)}"


def _front_words(best_of_all: Sequence[RunRecord], metric: Metric, budget: int | None) -> str:
    text = f"Each point is a run: its {metric_words(metric)} and its measured peak memory."
    if len(best_of_all) > 1:
        text += f" The {len(best_of_all)} runs on the line are beaten by no other in both."
    if budget is not None:
        text += f" The dashed line is the budget, {format_bytes(budget)}."
    return text


def _subtitle(runs: RunSet) -> str:
    starts = [record.started for record in runs.records if record.started]
    days = sorted({datetime.fromtimestamp(at).date().isoformat() for at in starts})
    when = "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    devices = sorted({record.device for record in runs.records if record.device})
    count = len(runs.records)
    parts = [f"{count} run{'s' if count != 1 else ''}", runs.source, when, ", ".join(devices)]
    return " · ".join(part for part in parts if part)


def _table_words(shown: int, count: int, metric: Metric, several: bool) -> str:
    which = "All runs" if shown == count else f"The first {shown} of {count} runs"
    return (
        f"{which}, {'by data, ' if several else ''}the best {metric_words(metric)} inside the "
        "budget first. Peaks are bytes "
        "allocated to tensors; runs.csv has every run and every setting that differs."
    )


def _missing(runs: RunSet, shares: Importance, predicted: bool, of_largest: str) -> list[str]:
    found = list(runs.notes)
    if shares.reason:
        found.append(f"Parameter importances: {shares.reason}.{of_largest}")
    if not predicted:
        found.append("Error of the predictions: no run was both predicted and measured.")
    if partly := [record.name for record in runs.records if record.partial]:
        more = f" and {len(partly) - 5} more" if partly[5:] else ""
        found.append(
            f"Figures with * are of a part of their split only (trainer.eval_batches): "
            f"{', '.join(partly[:5])}{more}."
        )
    if all(record.value is None for record in runs.records):
        found.append(f"{_against_memory(runs.metric)}: no run has {runs.metric.name}.")
    return found


def _problems(records: Sequence[RunRecord]) -> list[str]:
    counts = Counter(r.outcome for r in records if not r.outcome.trained)
    found = [f"{count} × {outcome.words}" for outcome, count in counts.most_common()]  # noqa: RUF001
    said = [
        f"{record.name}: {record.detail}"
        for record in records
        if record.detail and record.outcome.columns.trial_state == "FAIL"
    ]
    found += said[:MOST_PROBLEMS]
    if len(said) > MOST_PROBLEMS:
        found.append(f"… and {len(said) - MOST_PROBLEMS} more, in runs.csv")
    return found


def _footer(records: Sequence[RunRecord]) -> list[str]:
    meters = sorted({record.meter for record in records if record.meter})
    now = datetime.now().astimezone()
    lines = [f"Memory measured by: {'; '.join(meters)}."] if meters else []
    lines.append(
        f"Made {now:%Y-%m-%d %H:%M %Z} by expt {version('expt')}, Python "
        f"{platform.python_version()}, torch {version('torch')}."
    )
    return lines
