"""A step beside other processes that compute, for two ways in which its threads wait.

    python benchmarks/shared_cores.py [--again]

GNU's OpenMP lets threads that wait for one another spin for a while before they sleep: by default
for milliseconds, under ``python -m expt`` as briefly as it does itself where there are more threads
than cores. Steps of `+memory=lite`, with a thread for each core, are timed in processes of their
own, in rounds that alternate between the two; the others multiply matrices, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import cores, kept, last_words, make_trainer, markdown, provenance, source_line, store

from expt.__main__ import SPINS, let_threads_sleep

NAME = "shared_cores"
SETTINGS = ("+memory=lite", "data=metr_la_29", "trainer.device=cpu", "trainer.compile=off")
ROUNDS, WARM_UP, TIMED = 3, 2, 10
WAYS = {"default": False, "expt": True}
BUSY = """
import os, torch
torch.set_num_threads(1)
x, parent = torch.rand(256, 256), os.getppid()
while os.getppid() == parent:
    x @ x
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps:
        print(json.dumps(step_seconds()))
        return
    if kept(NAME, arguments.again):
        return
    record: dict[str, Any] = {"steps": {}, "settings": list(SETTINGS), "spins": SPINS}
    for others in range(3):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with busy(others):
            for _ in range(ROUNDS):
                for way in WAYS:
                    seconds[way] += timed(way)
        record["steps"][str(others)] = seconds
        print(others, {way: statistics.median(found) for way, found in seconds.items()}, flush=True)
    record["made"] = provenance()
    store(NAME, record, table(record))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes computing."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        if others:
            time.sleep(5.0)  # until they have imported torch
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def timed(way: str) -> list[float]:
    """Return the seconds of some steps of one process."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    if WAYS[way]:
        let_threads_sleep(own)
    done = subprocess.run(
        [sys.executable, __file__, "--steps"], capture_output=True, text=True, check=False, env=own
    )
    if done.returncode:
        raise SystemExit(f"{way}: {last_words(done.stderr)}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def step_seconds() -> list[float]:
    import torch

    torch.set_num_threads(cores())
    trainer = make_trainer(*SETTINGS)
    samples = trainer.batches.of(torch.arange(trainer.data.batch_size))
    found = []
    for _ in range(WARM_UP + TIMED):
        begun = time.perf_counter()
        trainer.train_step(samples)
        found.append(time.perf_counter() - begun)
    return found[WARM_UP:]


def table(record: dict[str, Any]) -> str:
    columns = ("other processes that compute", "threads spin as by default", "as under expt")
    rows = [
        (others, *(milliseconds(seconds[way]) for way in WAYS))
        for others, seconds in record["steps"].items()
    ]
    return (
        f"{markdown(columns, rows)}\n"
        f"A step of `{' '.join(SETTINGS[:2])}` with a thread for each core, in ms: the median of "
        f"{ROUNDS * TIMED} (the quickest to the slowest). {source_line(record, NAME)}"
    )


def milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


if __name__ == "__main__":
    main()
