"""From a message, a log or an exception to a diagnosis: what it is, why, and what to do first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from expt.memory.diagnosis import advice
from expt.memory.diagnosis.log_reader import LogContent, read_log
from expt.memory.diagnosis.lookalikes import Lookalike, find_lookalike
from expt.memory.diagnosis.oom import OomReport, chain, classify_oom, probable_oom
from expt.memory.diagnosis.oom_explanation import explain, figure_lines
from expt.memory.diagnosis.oom_wordings import HOST_KINDS
from expt.memory.diagnosis.trend import FEWEST, Forecast, Reading, Trend, forecast, judge
from expt.units import counted

DiagnosisKind = Literal["oom", "leak", "fragmentation", "other_process", "steady", "not_oom"]


@dataclass(frozen=True)
class Diagnosis:
    """The answer; `advice` is in the order in which to try it."""

    kind: DiagnosisKind
    cause: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]
    oom: OomReport | None = None
    trend: Trend | None = None
    forecast: Forecast | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what ``diagnosis.json`` holds."""
        return asdict(self)


def diagnose(text: str) -> Diagnosis:
    """Diagnose a message, a traceback, or the log, CSV or JSON of a run."""
    content = read_log(text)
    found = find_lookalike(content.after, in_log=bool(content.series))
    guessed = content.oom is not None and content.oom.kind == "killed"
    if guessed and found is not None and not found[0].follows:
        content = replace(content, oom=None, ran_out=False)
    trends = {
        name: judge(readings, content.ran_out and _may_have_run_out(name, content.oom))
        for name, readings in content.series.items()
    }
    worst = _worst(trends, content.oom)
    if worst is not None:
        return _of_trend(worst, trends, content)
    if trends and not content.ran_out:
        return _steady(trends, content) if found is None else _lookalike(found, _of_each(trends))
    if content.oom is not None:
        return _of_oom(content.oom, _of_each(trends))
    if content.ran_out:
        at = "" if content.oom_step is None else f" at step {content.oom_step:g}"
        evidence = (f"The log says that memory ran out{at}.", *_of_each(trends))
        return Diagnosis(
            "oom", "Memory ran out; there is no message with figures", evidence, advice.REMEDIES
        )
    return _not_oom(text) if found is None else _lookalike(found)


def diagnose_error(error: BaseException) -> Diagnosis:
    """Diagnose an exception, with those that led to it."""
    report = classify_oom(error)
    if report is not None:
        return _of_oom(report)
    texts = [f"{type(one).__name__}: {one}" for one in chain(error)]
    for text in texts:
        if found := find_lookalike(text):
            return _lookalike(found)
    for text in texts:
        if guess := probable_oom(text):
            return _of_oom(guess)
    return _not_oom(texts[0])


def _may_have_run_out(name: str, oom: OomReport | None) -> bool:
    """Tell whether a series is of the memory that ran out, as far as its name says."""
    if oom is None or not name:
        return True
    return ("CPU" in name) == (oom.kind in HOST_KINDS)


def _worst(trends: Mapping[str, Trend], oom: OomReport | None) -> str | None:
    """Return the series with the gravest verdict, None if all are steady."""
    order = ("leak", "fragmentation", "other_process")
    bad = [name for name in trends if trends[name].verdict != "steady"]
    bad = [name for name in bad if _may_have_run_out(name, oom)]
    return min(
        bad,
        key=lambda name: (
            order.index(trends[name].verdict),
            "CPU" in name,
            -trends[name].growth_bytes,
        ),
        default=None,
    )


def _of_each(trends: Mapping[str, Trend], but: str | None = None) -> tuple[str, ...]:
    """Return a sentence on each series but one."""
    return tuple(
        f"{name or 'The series without a device'}: {trend.verdict}. {trend.evidence[0]}"
        for name, trend in trends.items()
        if name != but
    )


def _of_oom(report: OomReport, more: tuple[str, ...] = ()) -> Diagnosis:
    kinds: dict[str, DiagnosisKind] = {
        "fragmentation": "fragmentation",
        "other_process": "other_process",
    }
    return Diagnosis(
        kinds.get(report.cause, "oom"),
        explain(report),
        (report.evidence, *figure_lines(report), *more),
        advice.advice_for(report.kind, report.cause),
        oom=report,
    )


def _of_trend(worst: str, trends: Mapping[str, Trend], content: LogContent) -> Diagnosis:
    trend, readings = trends[worst], content.series[worst]
    span = f"from step {trend.first_step:g} to {trend.last_step:g}"
    same = [name for name, one in trends.items() if one.verdict == trend.verdict and name]
    same = [_spoken(name) for name in same]
    on = f" on {' and '.join(same)}" if worst else ""
    causes = {
        "leak": f"There is a leak{on}{', accelerating' if trend.accelerating else ''}: "
        f"the memory kept after each step grows {span}",
        "fragmentation": f"The memory reserved without a tensor in it{on} grows {span}",
        "other_process": f"The memory that other processes hold{on} grows {span}",
    }
    kinds: dict[str, tuple[DiagnosisKind, tuple[str, ...]]] = {
        "leak": ("leak", advice.HOST_LEAK if "CPU" in worst else advice.LEAK),
        "fragmentation": ("fragmentation", advice.FRAGMENTATION),
        "other_process": ("other_process", advice.OTHER_PROCESS),
    }
    kind, what_to_do = kinds[trend.verdict]
    evidence = [*trend.evidence, *_of_each(trends, but=worst), *content.notes]
    if content.ran_out:
        at = "" if content.oom_step is None else f" at step {content.oom_step:g}"
        probably = " probably" if content.oom and content.oom.kind == "killed" else ""
        evidence.append(f"Memory{probably} ran out{at}.")
    if content.oom is not None:
        evidence += [content.oom.evidence, *figure_lines(content.oom)]
    ahead = None if content.ran_out else _ahead(trend, readings)
    if ahead is not None and ahead.action != "none":
        evidence.append(_outlook(ahead))
        what_to_do = (*what_to_do, f"Meanwhile: {ahead.advice}")
    return Diagnosis(
        kind, causes[trend.verdict], tuple(evidence), what_to_do, content.oom, trend, ahead
    )


def _spoken(series: str) -> str:
    """Return a series' name in a sentence."""
    device = series.removesuffix("reserved").strip()
    known = f"the {device}" if device in ("GPU", "CPU") else device
    if device == series:
        return known
    return f"{known}'s reserved memory" if known else "the reserved memory"


def _steady(trends: Mapping[str, Trend], content: LogContent) -> Diagnosis:
    name, trend = next(iter(trends.items()))
    few = trend.readings < FEWEST
    return Diagnosis(
        "steady",
        "There are too few readings to tell a trend"
        if few
        else "The memory neither grows nor fragments",
        (*trend.evidence, *_of_each(trends, but=name), *content.notes),
        ("Log the bytes allocated after a step, at least ten times",) if few else (),
        None,
        trend,
        None if few else _ahead(trend, content.readings),
    )


def _ahead(trend: Trend, readings: Sequence[Reading]) -> Forecast | None:
    """Continue the log as far again as it goes, where it says what the device has."""
    totals = [one.total_bytes for one in readings if one.total_bytes is not None]
    if not totals:
        return None
    return forecast(readings, totals[-1], max(trend.last_step - trend.first_step, 1.0) / 2)


def _outlook(ahead: Forecast) -> str:
    left = "" if ahead.steps_left is None else f", in about {ahead.steps_left:.0f} steps"
    steps = f"{ahead.horizon_steps:.0f} steps"
    return f"Memory runs out within {steps} with a probability of {ahead.risk:.0%}{left}."


def _lookalike(found: tuple[Lookalike, str], more: tuple[str, ...] = ()) -> Diagnosis:
    lookalike, line = found
    name = lookalike.name[0].upper() + lookalike.name[1:]
    return Diagnosis("not_oom", name, (line, *more), (lookalike.advice,))


def _not_oom(text: str) -> Diagnosis:
    return Diagnosis(
        "not_oom",
        "Neither an out-of-memory message nor a series of memory readings was found",
        (f"The text has {counted(len(text.splitlines()), 'line')}.",),
        (
            "Give the whole traceback, or a log whose lines name a step and an amount of memory, "
            "as in 'step 100: 18.2 GiB'",
        ),
    )
