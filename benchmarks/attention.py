"""How attention kernels differ: peak memory and time, forward and backward, by sequence length.

    python benchmarks/attention.py [--device cpu|cuda] [--lengths 512 1024 2048 4096] [--again]

One sequence, 4 heads of width 32, fp32. The peak is that of a ledger of tensor storages on the
CPU, of the allocator on CUDA. Rows already in the result file are kept unless `--again`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import RESULTS, load, markdown, provenance, source_line, store
from torch import Tensor

from expt.jobs import attention as attention_kernels
from expt.memory.measuring.meter import meter_for

LENGTHS = (512, 1024, 2048, 4096)
HEADS, WIDTH = 4, 32
WINDOW, TOP_K = 128, 64
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "math": attention_kernels.materialised,
    "fused": attention_kernels.fused,
    f"sliding_window, {WINDOW}": partial(attention_kernels.sliding_window, window=WINDOW),
    f"top_k, {TOP_K}": partial(attention_kernels.top_k, k=TOP_K),
}
TIMED_STEPS = 3
MIB = 1024**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    record = {"rows": {}, **load("attention")}
    for length in arguments.lengths:
        for kernel in KERNELS:
            name = f"{kernel} | {length} | {arguments.device}"
            if name in record["rows"] and not arguments.again:
                continue
            print(name, flush=True)
            record["rows"][name] = measure(kernel, length, torch.device(arguments.device))
            record["made"] = provenance()
            store("attention", record, tables(record))
    plot(record)


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


def tables(record: dict[str, Any]) -> str:
    """Return a table per device: peak and time of every kernel, and the saving over math."""
    parts = []
    for device in sorted({row["device"] for row in record["rows"].values()}):
        lengths = lengths_of(record, device)
        rows = []
        for kernel in KERNELS:
            found = [kernel]
            for length in lengths:
                row = record["rows"].get(f"{kernel} | {length} | {device}")
                math = record["rows"].get(f"math | {length} | {device}")
                if row is None or math is None:
                    found.append("not measured")
                    continue
                share = 1 - row["peak_bytes"] / math["peak_bytes"]
                saved = f" (-{100 * share:.0f} %)" if row is not math else ""
                peak = f"{row['peak_bytes'] / MIB:.1f} MiB{saved}"
                found.append(f"{peak}, {1000 * row['seconds']:.0f} ms")
            rows.append(found)
        parts.append(
            f"Forward and backward of one sequence, {HEADS} heads of width {WIDTH}, fp32, on "
            f"{device}: peak (against math) and {'CPU ' if device == 'cpu' else ''}time:\n"
        )
        parts.append(markdown(["kernel", *(f"{length} tokens" for length in lengths)], rows))
    return "\n".join(parts) + "\n" + source_line(record, "attention")


def plot(record: dict[str, Any]) -> None:
    """Draw peak and time over length, a file per device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for device in sorted({row["device"] for row in record["rows"].values()}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for kernel in KERNELS:
            rows = [
                row
                for length in lengths_of(record, device)
                if (row := record["rows"].get(f"{kernel} | {length} | {device}")) is not None
            ]
            lengths = [row["length"] for row in rows]
            left.plot(lengths, [row["peak_bytes"] / MIB for row in rows], "o-", label=kernel)
            right.plot(lengths, [1000 * row["seconds"] for row in rows], "o-", label=kernel)
        for axes, title, unit in (
            (left, "Peak memory, forward and backward", "MiB"),
            (right, "CPU time, forward and backward" if device == "cpu" else "Time", "ms"),
        ):
            axes.set(title=title, xlabel="tokens", ylabel=unit, xscale="log", yscale="log")
            lengths = lengths_of(record, device)
            axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(RESULTS / f"attention_{device}.png", dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
