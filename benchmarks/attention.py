"""How attention kernels differ: peak memory and time, forward and backward, by sequence length.

    python benchmarks/attention.py [--device cpu|cuda] [--lengths 512 1024 2048 4096] [--again]

One sequence, 4 heads of width 32, fp32. The peak is that of a ledger of tensor storages on the
CPU, of the allocator on CUDA. Beside what is measured stand what a guide claims, and what
`expt.memory.plan` predicts for the CPU and for CUDA. Rows already in the result file are kept
unless `--again`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from common import RESULTS, load, markdown, provenance, source_line, stamped, store
from torch import Tensor, nn

from expt.jobs import attention as attention_kernels
from expt.memory import plan
from expt.memory.measuring.meter import LEDGER_STEPS, meter_for
from expt.memory.planning.plan import Target

TARGETS: tuple[Target, ...] = ("cpu", "cuda")
LENGTHS = (512, 1024, 2048, 4096)
HEADS, WIDTH = 4, 32
WINDOW, TOP_K = 128, 64
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "math": attention_kernels.materialised,
    "fused": attention_kernels.fused,
    f"sliding_window, {WINDOW}": partial(attention_kernels.sliding_window, window=WINDOW),
    f"top_k, {TOP_K}": partial(attention_kernels.top_k, k=TOP_K),
}
NAMES = {
    "math": "standard (math)",
    "fused": "flash (fused)",
    f"sliding_window, {WINDOW}": f"sliding window, {WINDOW}",
    f"top_k, {TOP_K}": f"top-k, {TOP_K}",
}
CLAIMS = {"fused": (0.60, 0.80), f"sliding_window, {WINDOW}": (0.70, 0.90)}
"""Least and most that a kernel saves of the standard one's peak, as a handbook on running out of
memory claims it for GPUs; it claims nothing of top-k."""
COLOURS = dict(zip(KERNELS, ("#222222", "#0072B2", "#009E73", "#E69F00"), strict=True))
TIMED_STEPS = 3
MIB = 1024**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    record = {"rows": {}, "predicted": {}, **load("attention")}
    if "made" in record:  # rows of a time before each had its own commit
        made = {name: record["made"][name] for name in ("date", "commit")}
        record["rows"] = {name: {**made, **row} for name, row in record["rows"].items()}
    for length in arguments.lengths:
        for kernel in KERNELS:
            name = f"{kernel} | {length} | {arguments.device}"
            if name in record["rows"] and not arguments.again:
                continue
            print(name, flush=True)
            row = measure(kernel, length, torch.device(arguments.device))
            record["rows"][name] = stamped(row)
            record["made"] = provenance()
            store("attention", record, tables(record))
        for kernel, target in product(KERNELS, TARGETS):
            name = f"{kernel} | {length} | {target}"
            if name in record["predicted"] and not arguments.again:
                continue
            print(name, "predicted", flush=True)
            record["predicted"][name] = stamped(predict(kernel, length, target))
            record["made"] = provenance()
    store("attention", record, tables(record))
    plot(record)


class Attended(nn.Module):
    """Queries, keys and values [1, H, L, D/H] as weights, so that a plan has their gradients."""

    def __init__(self, kernel: str, length: int) -> None:
        super().__init__()
        self.kernel = KERNELS[kernel]
        self.parts = nn.ParameterList(torch.randn(1, HEADS, length, WIDTH) for _ in range(3))

    def forward(self, scale: Tensor) -> Tensor:
        """Return the attended values, and let the batch, a single number, take part."""
        return self.kernel(*self.parts).sum() * scale


def predict(kernel: str, length: int, target: Target) -> dict[str, Any]:
    """Return the predicted peak of forward and backward."""
    planned = plan(
        model_fn=lambda: Attended(kernel, length),
        batch_fn=lambda: torch.ones(()),
        loss_fn=lambda model, batch: model(batch),
        optimizer_fn=partial(torch.optim.SGD, lr=0.1, foreach=False),
        target=target,
        holds_outputs=False,
    )
    return {"peak_bytes": planned.peak_bytes, "method": planned.method, "phase": planned.phase}


def measure(kernel: str, length: int, device: torch.device) -> dict[str, Any]:
    """Return peak bytes and the quickest seconds of forward and backward."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, HEADS, length, WIDTH)
    parts = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]

    def step() -> None:
        KERNELS[kernel](*parts).sum().backward()
        for part in parts:
            part.grad = None

    meter = meter_for(device)
    meter.start_epoch()
    for _ in range(LEDGER_STEPS):  # the last shows what kernels hold inside
        with meter.step():
            step()
    peak = meter.peak_allocated_bytes()
    # On the CPU its own time on one thread, to which other work on the machine adds little.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(TIMED_STEPS):
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return {
        "kernel": kernel,
        "length": length,
        "device": device.type,
        "meter": meter.name,
        "peak_bytes": peak,
        "seconds": min(times),
    }


def lengths_of(record: dict[str, Any], device: str) -> list[int]:
    return sorted({row["length"] for row in record["rows"].values() if row["device"] == device})


def saving(rows: Mapping[str, Any], kernel: str, length: int, device: str) -> float | None:
    """Return the share of the standard kernel's peak that a kernel saves, if both are known."""
    row, math = (rows.get(f"{name} | {length} | {device}") for name in (kernel, "math"))
    return None if row is None or math is None else 1 - row["peak_bytes"] / math["peak_bytes"]


def tables(record: dict[str, Any]) -> str:
    """Return a table per device that was measured, with the verdict on every claim."""
    parts = []
    for device in sorted({row["device"] for row in record["rows"].values()}):
        parts.append(
            f"Forward and backward of one sequence, {HEADS} heads of width {WIDTH}, fp32, on "
            f"{device}: {'CPU ' if device == 'cpu' else ''}time, peak, and what is saved of the "
            "standard kernel's peak, as claimed by a handbook for GPUs, measured, and predicted:\n"
        )
        parts.append(table(record, device))
        parts += [f"- {verdict(record, kernel, device)}" for kernel in KERNELS if kernel != "math"]
        parts.append("")
    parts.append(ABOUT_CUDA)
    return "\n".join(parts) + "\n" + source_line(record, "attention")


ABOUT_CUDA = (
    "Predicted peaks for CUDA hold cuBLAS's workspace of 8.1 MiB, whatever the length, which makes "
    "the shares smaller where sequences are short. Nothing of this has been measured on a GPU.\n"
)


def table(record: dict[str, Any], device: str) -> str:
    """Return a row per kernel and length."""
    rows = []
    for kernel, length in product(KERNELS, lengths_of(record, device)):
        row = record["rows"].get(f"{kernel} | {length} | {device}")
        if row is None:
            continue
        low, high = CLAIMS.get(kernel, (None, None))
        claimed = f"{100 * low:.0f} to {100 * high:.0f} %" if low and high else "-"
        measured = saving(record["rows"], kernel, length, device)
        found = [measured, *(saving(record["predicted"], kernel, length, t) for t in TARGETS)]
        shares = ["-" if kernel == "math" else percent(share) for share in found]
        time, peak = 1000 * row["seconds"], row["peak_bytes"] / MIB
        rows.append([NAMES[kernel], str(length), f"{time:.0f} ms", f"{peak:.1f} MiB", claimed])
        rows[-1] += shares
    heads = ["kernel", "tokens", "time", "peak", "claimed", f"measured ({device})"]
    return markdown([*heads, *(f"predicted ({target})" for target in TARGETS)], rows)


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def verdict(record: dict[str, Any], kernel: str, device: str) -> str:
    """Say where a claim holds, of what was measured and of what is predicted for CUDA."""
    name = NAMES[kernel].split(",")[0]
    if kernel not in CLAIMS:
        return f"{name}: nothing is claimed."
    words = []
    for source, where, text in (
        ("rows", device, f"measured on {device}, it saves"),
        ("predicted", "cuda", "predicted for CUDA,"),
    ):
        lengths = lengths_of(record, device)
        shares = [saving(record[source], kernel, length, where) for length in lengths]
        words.append(f"{text} {compared(CLAIMS[kernel], lengths, shares)}")
    low, high = CLAIMS[kernel]
    return f"{name}, claimed {100 * low:.0f} to {100 * high:.0f} %: {'; '.join(words)}."


def compared(
    claim: tuple[float, float], lengths: Sequence[int], shares: Sequence[float | None]
) -> str:
    """Say at which lengths shares are below, in and above what is claimed."""
    sides: dict[str, list[str]] = {}
    for length, share in zip(lengths, shares, strict=True):
        if share is not None:
            side = "less" if share < claim[0] else "more" if share > claim[1] else "as claimed"
            sides.setdefault(side, []).append(str(length))
    if len(sides) == 1:
        return f"{next(iter(sides))} at every length"
    return ", ".join(f"{side} at {' and '.join(at)} tokens" for side, at in sides.items())


def plot(record: dict[str, Any]) -> None:
    """Draw peak and time over length, a file per device; bands are what is claimed of peaks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for device in sorted({row["device"] for row in record["rows"].values()}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        lengths = lengths_of(record, device)
        for kernel in KERNELS:
            draw(left, record, device, kernel, "peak_bytes", 1 / MIB)
            draw(right, record, device, kernel, "seconds", 1000)
        standard = [record["rows"].get(f"math | {length} | {device}") for length in lengths]
        for kernel, (low, high) in CLAIMS.items():
            edges = [
                [(1 - share) * row["peak_bytes"] / MIB for row in standard if row]
                for share in (low, high)
            ]
            known = [length for length, row in zip(lengths, standard, strict=True) if row]
            left.fill_between(known, *edges, color=COLOURS[kernel], alpha=0.18, linewidth=0)
            if known:
                label(left, (known[-1], edges[0][-1]), f"claimed, {NAMES[kernel]}", kernel, -12)
        for axes, title, unit in (
            (left, "Peak memory", "MiB"),
            (right, "CPU time" if device == "cpu" else "Time", "ms"),
        ):
            axes.set(xlabel="tokens", ylabel=unit, xscale="log", yscale="log")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlim(lengths[0] / 1.1, lengths[-1] * 2.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        figure.savefig(RESULTS / f"attention_{device}.png", dpi=120)
        pyplot.close(figure)


def draw(
    axes: Any, record: dict[str, Any], device: str, kernel: str, figure: str, factor: float
) -> None:
    """Draw a kernel's line with its name at the end; names keep apart as their lines do."""
    rows = [
        row
        for length in lengths_of(record, device)
        if (row := record["rows"].get(f"{kernel} | {length} | {device}")) is not None
    ]
    lengths, values = [r["length"] for r in rows], [factor * r[figure] for r in rows]
    axes.plot(lengths, values, "o-", color=COLOURS[kernel], markersize=4)
    lift = LIFTS.get((figure, kernel), -3)
    label(axes, (lengths[-1], values[-1]), NAMES[kernel], kernel, lift)


def label(axes: Any, at: tuple[float, float], text: str, kernel: str, lift: int) -> None:
    """Write a name to the right of a point, in the kernel's colour."""
    axes.annotate(
        text, at, xytext=(7, lift), textcoords="offset points", color=COLOURS[kernel], fontsize=9
    )


LIFTS = {("peak_bytes", "fused"): -8, ("peak_bytes", f"sliding_window, {WINDOW}"): 2}
"""Where a name is, in points above its line's end, if not beside it."""


if __name__ == "__main__":
    main()
