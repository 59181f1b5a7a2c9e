"""An out-of-memory report in sentences: where it happened, why, and the figures behind it."""

from __future__ import annotations

from expt.memory.diagnosis.oom import OomReport
from expt.memory.diagnosis.oom_figures import Figures
from expt.memory.diagnosis.oom_wordings import HOST_KINDS
from expt.units import format_bytes

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


def explain(report: OomReport) -> str:
    """Return where memory ran out and why."""
    ran_out = "Memory probably ran out" if report.kind == "killed" else "Memory ran out"
    is_loader = report.kind == "killed" and "DataLoader" in report.evidence
    place = PLACES["loader_killed" if is_loader else report.kind]
    why = _why(report)
    return f"{ran_out} {place}{'. ' if why else ''}{why}"


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
            return f"Other processes probably hold it: {_held(figures)}"
        case "other_process":
            return f"Other processes hold {others} of {total}"
        case "limit" if figures.limit_bytes is not None:
            room = "" if figures.free_bytes is None else f"; {free} of the device are free"
            return f"A limit of {limit} on this process was reached{room}"
        case "limit":
            return f"The device probably limits a single allocation: {_held(figures)}"
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


def _held(figures: Figures) -> str:
    held = f"only {format_bytes(figures.held_bytes)}" if figures.held_bytes else "nothing"
    return f"this process holds {held} of {format_bytes(figures.total_bytes)}"


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


def figure_lines(report: OomReport) -> tuple[str, ...]:
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
