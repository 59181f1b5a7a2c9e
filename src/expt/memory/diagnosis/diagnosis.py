"""From a message, a log or an exception to a diagnosis: what it is, why, and what to do first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from expt.memory.diagnosis import advice
from expt.memory.diagnosis.log_reader import LogContent, read_log
from expt.memory.diagnosis.lookalikes import find_lookalike
from expt.memory.diagnosis.oom import OomReport, classify_oom, probable_oom
from expt.memory.diagnosis.oom_figures import Figures
from expt.memory.diagnosis.oom_wordings import HOST_KINDS
from expt.memory.diagnosis.trend import FEWEST, Forecast, Reading, Trend, forecast, judge
from expt.units import counted, format_bytes

DiagnosisKind = Literal["oom", "leak", "fragmentation", "other_process", "steady", "not_oom"]

LARGE_REQUEST = 0.05
"""Part of the device in one tensor from which on it is likely an attention matrix or the like."""
PLACES = {
    "cuda": "on the CUDA device",
    "cublas": "on the CUDA device, for cuBLAS",
    "cudnn": "on the CUDA device, for cuDNN",
    "cuda_library": "on the CUDA device, for one of CUDA's libraries",
    "nccl": "on the CUDA device, for NCCL",
    "nvml": "on the CUDA device (torch was refused the figures of its message, as on MIG)",
    "hip": "on the AMD device",
    "xpu": "on the Intel device",
    "mps": "on Apple's GPU",
    "npu": "on the Ascend device",
    "device": "on the device",
    "host_allocator": "on the host",
    "memory_error": "on the host (Python's MemoryError)",
    "oom_killer": "on the host, and the system ended the process",
    "ray": "on the host, and Ray ended a task because its node ran low",
    "killed": "on the host: a process was killed with signal 9, as the system does for memory",
    "loader_killed": "on the host: a data-loader worker was killed, as the system does for memory",
}


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
    found = find_lookalike(text)
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
        return _steady(trends, content)
    if content.oom is not None:
        return _of_oom(content.oom, _of_each(trends))
    if content.ran_out:
        at = "" if content.oom_step is None else f" at step {content.oom_step:g}"
        evidence = (f"The log says that memory ran out{at}.", *_of_each(trends))
        return Diagnosis(
            "oom", "Memory ran out; there is no message with figures", evidence, advice.REMEDIES
        )
    return _not_oom(text)


def diagnose_error(error: BaseException) -> Diagnosis:
    """Diagnose an exception, with those that led to it."""
    text = f"{type(error).__name__}: {error}"
    report = classify_oom(error) or (None if find_lookalike(text) else probable_oom(text))
    return _of_oom(report) if report is not None else _not_oom(text)


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
        key=lambda name: (order.index(trends[name].verdict), -trends[name].growth_bytes),
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
    ran_out = "Memory probably ran out" if report.kind == "killed" else "Memory ran out"
    why = _why(report)
    is_loader = report.kind == "killed" and "DataLoader" in report.evidence
    place = PLACES["loader_killed" if is_loader else report.kind]
    return Diagnosis(
        kinds.get(report.cause, "oom"),
        f"{ran_out} {place}{'. ' if why else ''}{why}",
        (report.evidence, *_figures(report), *more),
        advice.advice_for(report.kind, report.cause),
        oom=report,
    )


def _why(report: OomReport) -> str:
    """Return the cause as a sentence; nothing where the message does not say."""
    figures = report.figures
    others, total = format_bytes(figures.others_bytes), format_bytes(figures.total_bytes)
    limit, free = format_bytes(figures.limit_bytes), format_bytes(figures.free_bytes)
    match report.cause:
        case "full":
            return _how_full(report)
        case "fragmentation":
            return (
                "This is fragmentation: the allocator holds "
                f"{format_bytes(figures.unused_bytes)} without a tensor, in pieces too small"
            )
        case "other_process" if report.kind == "mps":
            return f"{others} of {total} are other allocations, outside torch's allocator"
        case "other_process" if figures.others_are_inferred:
            return (
                f"Other processes probably hold it: this process holds only "
                f"{format_bytes(figures.held_bytes)} of {total}"
            )
        case "other_process":
            return f"Other processes hold {others} of {total}"
        case "limit" if figures.limit_bytes is not None:
            room = "" if figures.free_bytes is None else f"; {free} of the device are free"
            return f"A limit of {limit} on this process was reached{room}"
        case "limit":
            return (
                "The device probably limits a single allocation: this process holds only "
                f"{format_bytes(figures.held_bytes)} of {total}"
            )
        case "transient":
            return (
                f"{free} were free when the message was written, enough for the "
                f"{format_bytes(figures.requested_bytes)} asked for: somebody took memory for a "
                "moment, or a limit that the message does not name was reached"
            )
        case "too_large":
            return "One tensor is larger than the whole device; its shape is probably wrong"
        case _:
            return "" if report.kind in HOST_KINDS else "The message gives no figures"


def _how_full(report: OomReport) -> str:
    figures = report.figures
    if report.kind in HOST_KINDS:
        return _what_was_asked(figures).removeprefix("; ").capitalize()
    split = "" if figures.fragmented_fraction is None else "This is not fragmentation: "
    held, total = figures.allocated_bytes, figures.total_bytes
    tensors = ""
    if held is not None:
        whole = "" if total is None else f" of {format_bytes(total)}"
        tensors = f": {format_bytes(held)}{whole} are in tensors"
    subject = "the device" if split else "The device"
    return f"{split}{subject} is really full{tensors}{_what_was_asked(figures)}"


def _what_was_asked(figures: Figures) -> str:
    requested, total = figures.requested_bytes, figures.total_bytes
    if requested is None or not total:
        return ""
    if requested >= LARGE_REQUEST * total:
        return (
            f"; {format_bytes(requested)} in one tensor, likely an attention matrix "
            "(batch x heads x length² x bytes) or one layer's activations"
        )
    return "; what was asked for is small, so it is the sum of what is kept"


def _figures(report: OomReport) -> tuple[str, ...]:
    """Return the sums that the verdict rests on."""
    figures = report.figures
    others = (
        "other allocations"
        if report.kind == "mps"
        else "held by others, this process's context included"
    )
    lines = [
        f"{name}: {format_bytes(count)}"
        for name, count in (
            ("asked for", figures.requested_bytes),
            ("capacity", figures.total_bytes),
            ("free", figures.free_bytes),
            ("allocated to tensors", figures.allocated_bytes),
            ("reserved by the allocator", figures.reserved_bytes),
            (others, figures.others_bytes),
            ("limit", figures.limit_bytes),
        )
        if count is not None
    ]
    if figures.fragmented_fraction is not None:
        lines.append(
            f"reserved but unallocated: {format_bytes(figures.unused_bytes)}, "
            f"{figures.fragmented_fraction:.1%} of what is reserved"
        )
    return tuple(lines)


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
        evidence += [content.oom.evidence, *_figures(content.oom)]
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


def _not_oom(text: str) -> Diagnosis:
    found = find_lookalike(text)
    if found is not None:
        lookalike, line = found
        return Diagnosis("not_oom", lookalike.name, (line,), (lookalike.advice,))
    return Diagnosis(
        "not_oom",
        "neither an out-of-memory message nor a series of memory readings was found",
        (f"{counted(len(text.splitlines()), 'line')} read",),
        (
            "Give the whole traceback, or a log whose lines name a step and an amount of memory, "
            "as in 'step 100: 18.2 GiB'",
        ),
    )
