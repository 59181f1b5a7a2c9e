"""From a message, a log or an exception to a diagnosis: what it is, why, and what to do first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from expt.memory.diagnosis import advice
from expt.memory.diagnosis.forecast import Forecast, forecast
from expt.memory.diagnosis.lookalikes import find_lookalike
from expt.memory.diagnosis.oom import OomReport, classify_oom
from expt.memory.diagnosis.oom_figures import Figures
from expt.memory.diagnosis.reading import LogContent, read_log
from expt.memory.diagnosis.trend import Trend, judge
from expt.units import counted, format_bytes

DiagnosisKind = Literal["oom", "leak", "fragmentation", "other_process", "steady", "not_oom"]

LARGE_REQUEST = 0.05
"""Part of the device in one tensor from which on it is likely an attention matrix or the like."""
SOURCES = {
    "cuda": "the CUDA device",
    "cublas": "cuBLAS, on the CUDA device",
    "cudnn": "cuDNN, on the CUDA device",
    "cuda_library": "a CUDA library",
    "nccl": "NCCL, on the CUDA device",
    "nvml": "the CUDA device (torch asked NVML for figures to report and was refused, as on MIG)",
    "hip": "the AMD device",
    "xpu": "the Intel device",
    "mps": "Apple's GPU",
    "device": "the device",
    "host_allocator": "the host's memory",
    "memory_error": "the host's memory (Python)",
    "oom_killer": "the host's memory: the system ended the process",
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
    if content.readings:
        trend = judge(content.readings, content.ran_out)
        if trend.verdict != "steady":
            return _of_trend(trend, content)
        if not content.ran_out:
            return _steady(trend, content)
    if content.oom is not None:
        return _of_oom(content.oom)
    if content.ran_out:
        evidence = f"the log says so at step {content.oom_step:g}" if content.oom_step else "a line"
        return Diagnosis("oom", "memory ran out; no figures", (evidence,), advice.REMEDIES)
    return _not_oom(text)


def diagnose_error(error: BaseException) -> Diagnosis:
    """Diagnose an exception, with those that led to it."""
    report = classify_oom(error)
    return _of_oom(report) if report is not None else _not_oom(f"{type(error).__name__}: {error}")


def _of_oom(report: OomReport) -> Diagnosis:
    figures = report.figures
    kinds: dict[str, DiagnosisKind] = {
        "fragmentation": "fragmentation",
        "other_process": "other_process",
    }
    return Diagnosis(
        kinds.get(report.cause, "oom"),
        f"{SOURCES[report.kind]}: {_why(report)}",
        (report.evidence, *_figures(figures)),
        advice.advice_for(report.kind, report.cause),
        oom=report,
    )


def _why(report: OomReport) -> str:
    figures = report.figures
    if report.cause == "full":
        split = "" if figures.fragmented_fraction is None else "not fragmentation: "
        return f"{split}really full{_what_was_asked(figures)}"
    return {
        "fragmentation": "fragmentation: what is held without a tensor is in pieces too small",
        "other_process": "other processes hold much of it",
        "limit": "a limit on this process, lower than the device",
        "too_large": "one tensor larger than the whole device; likely a wrong shape",
        "unknown": "memory ran out; the message gives no figures",
    }[report.cause]


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


def _figures(figures: Figures) -> tuple[str, ...]:
    """Return the sums that the verdict rests on."""
    lines = [
        f"{name}: {format_bytes(count)}"
        for name, count in (
            ("asked for", figures.requested_bytes),
            ("capacity", figures.total_bytes),
            ("free", figures.free_bytes),
            ("allocated to tensors", figures.allocated_bytes),
            ("reserved by the allocator", figures.reserved_bytes),
            ("other processes", figures.other_processes_bytes),
            ("limit", figures.limit_bytes),
        )
        if count is not None
    ]
    if figures.fragmented_fraction is not None:
        lines.append(
            f"reserved but unallocated: {format_bytes(figures.unused_bytes)}, "
            f"{figures.fragmented_fraction:.1%} of what is reserved (fragmentation: over 20 %)"
        )
    return tuple(lines)


def _of_trend(trend: Trend, content: LogContent) -> Diagnosis:
    span = f"from step {trend.first_step:g} to {trend.last_step:g}"
    causes = {
        "leak": f"leak{', accelerating' if trend.accelerating else ''}: "
        f"memory kept after each step grows {span}",
        "fragmentation": f"what is reserved without a tensor in it grows {span}",
        "other_process": f"what other processes hold grows {span}",
    }
    kinds: dict[str, tuple[DiagnosisKind, tuple[str, ...]]] = {
        "leak": ("leak", advice.LEAK),
        "fragmentation": ("fragmentation", advice.FRAGMENTATION),
        "other_process": ("other_process", advice.OTHER_PROCESS),
    }
    kind, what_to_do = kinds[trend.verdict]
    evidence = list(trend.evidence)
    if content.ran_out:
        at = "" if content.oom_step is None else f" at step {content.oom_step:g}"
        evidence.append(f"memory ran out{at}")
    if content.oom is not None:
        evidence += [content.oom.evidence, *_figures(content.oom.figures)]
    ahead = None if content.ran_out else _ahead(trend, content)
    if ahead is not None and ahead.action != "none":
        evidence.append(_outlook(ahead))
        what_to_do = (*what_to_do, f"Meanwhile: {ahead.advice}")
    return Diagnosis(
        kind, causes[trend.verdict], tuple(evidence), what_to_do, content.oom, trend, ahead
    )


def _steady(trend: Trend, content: LogContent) -> Diagnosis:
    few = trend.readings < 4
    return Diagnosis(
        "steady",
        "too few readings to tell a trend" if few else "memory neither grows nor falls apart",
        trend.evidence,
        ("Log the bytes allocated after a step, at least ten times",) if few else (),
        None,
        trend,
        None if few else _ahead(trend, content),
    )


def _ahead(trend: Trend, content: LogContent) -> Forecast | None:
    """Continue the log as far again as it goes, where it says what the device has."""
    totals = [r.total_bytes for r in content.readings if r.total_bytes is not None]
    if not totals:
        return None
    return forecast(content.readings, totals[-1], max(trend.last_step - trend.first_step, 1.0) / 2)


def _outlook(ahead: Forecast) -> str:
    left = "" if ahead.steps_left is None else f", in about {ahead.steps_left:.0f} steps"
    return f"risk of running out within {ahead.horizon_steps:.0f} steps: {ahead.risk:.0%}{left}"


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
