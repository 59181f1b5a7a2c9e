"""What pays on a CPU: bf16 against fp32, torch.compile against eager, all threads against one.

Every contender is a process of its own (`OMP_NUM_THREADS` is read when one starts) and differs
from `eager`, which is fp32 with all threads, in one thing. `speed.py` calls `measure`; run as a
program, this file is one contender. Whether the processor multiplies bf16 matrices in hardware
(AMX, AVX-512 BF16) is in the result, since that decides what bf16 is worth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import cores, last_words

DATA = {29: "data=metr_la_29", 207: "data=metr_la_week"}
EAGER = "eager"
CONTENDERS: dict[str, tuple[str, ...]] = {
    EAGER: (),
    "bf16": ("memory.precision=bf16",),
    "compile": ("trainer.compile=compile",),
    "one thread": (),
}
BASE = ("memory.precision=fp32", "trainer.compile=off")
FLAGS = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2")
BUDGET_SECONDS = 450.0
"""For all contenders; those that it does not reach are not measured, and say so."""
MOST_SECONDS = 120.0
"""For one contender, start and compilation included."""


def measure(
    presets: Sequence[str], sensors: Sequence[int], seconds: float, *overrides: str
) -> dict[str, Any]:
    """Return a row for each preset, number of sensors and contender.

    Args:
        presets: whose model and batch.
        sensors: 29 or 207.
        seconds: of steps that are timed, per contender; at least three steps.
        overrides: more settings of the configuration.

    """
    until = time.monotonic() + BUDGET_SECONDS
    rows = [
        {
            "preset": preset,
            "sensors": count,
            "contender": name,
            **contend(preset, count, name, seconds, until - time.monotonic(), *overrides),
        }
        for preset in presets
        for count in sensors
        for name in CONTENDERS
    ]
    return {"rows": rows, "processor": {flag: flag in flags() for flag in FLAGS}}


def contend(
    preset: str, sensors: int, name: str, seconds: float, left: float, *overrides: str
) -> dict[str, Any]:
    """Return one contender's figures, or why there are none."""
    if left <= 0:
        return {"error": f"not reached within {BUDGET_SECONDS:.0f} s"}
    threads = 1 if name == "one thread" else cores()
    given = dict(line.split("=", 1) for line in (*BASE, *CONTENDERS[name], *overrides))
    command = [sys.executable, __file__, preset, str(seconds), DATA[sensors]]
    try:
        done = subprocess.run(
            [*command, *(f"{key}={value}" for key, value in given.items())],
            capture_output=True, text=True, check=False, timeout=min(MOST_SECONDS, left),
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {min(MOST_SECONDS, left):.0f} s"}
    if done.returncode != 0:
        return {"error": last_words(done.stderr)}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, "threads": threads}


def flags() -> set[str]:
    """Return what the processor says it can do; nothing where /proc does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()}


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table: ms a step, and what each contender is worth against eager steps."""
    cells = {(row["preset"], row["sensors"], row["contender"]): row for row in result["rows"]}
    found = []
    for preset, sensors in dict.fromkeys((row["preset"], row["sensors"]) for row in result["rows"]):
        line = [f"{preset}, {sensors}"]
        eager = cells[preset, sensors, EAGER].get("seconds_per_step")
        for name in CONTENDERS:
            own = cells[preset, sensors, name].get("seconds_per_step")
            if own is None:
                line.append("not measured")
            elif name == "compile" and cells[preset, sensors, name].get("said"):
                line.append("stayed eager")  # and its row says why
            elif name == EAGER or eager is None:
                line.append(f"{1e3 * own:.0f}")
            else:
                line.append(f"{1e3 * own:.0f} (x{eager / own:.2f})")
        found.append(tuple(line))
    return found


def main() -> None:
    """Run one contender and print its row."""
    from gpu_steps import step

    preset, seconds, data, *overrides = sys.argv[1:]
    row = step(preset, "cpu", float(seconds), *overrides, data=data)
    keys = ("batch_size", "seconds_per_step", "warm_up_seconds", "steps", "said")
    print(json.dumps({key: row[key] for key in keys}))


if __name__ == "__main__":
    main()
