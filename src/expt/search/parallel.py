"""How many trials run side by side, and how many threads each of them has.

``search.n_jobs=auto`` is one trial per GPU, or one per core where there is none, as long as the
budgets of all of them fit the machine's memory together: on a CPU, `memory.budget` is of each
process. A trial's kernels get an equal share of the cores, so that trials do not fight for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expt.config.search_node import AUTO
from expt.errors import ConfigError
from expt.memory.measuring.device_memory import host_bytes
from expt.units import format_bytes

THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class SideBySide:
    """Trials at the same time, and torch's threads in each; None leaves these to torch."""

    n_jobs: int
    threads: int | None = None
    note: str | None = None


def side_by_side(
    asked: int | str,
    devices: Sequence[str],
    on_mps: bool,
    budget_bytes: int | None,
    launcher: str | None = None,
    most: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> SideBySide:
    """Return how trials share this machine.

    Args:
        asked: `search.n_jobs`.
        devices: names of the CUDA devices that trials may use.
        on_mps: whether trials train on MPS, which is one device.
        budget_bytes: of each trial, None without a budget.
        launcher: the Hydra launcher that trials go to, None: processes of this machine.
        most: how many trials there can be, None where this is not known.
        environment: where a number of threads that is given wins.

    Raises:
        ConfigError: ``auto`` with a launcher, whose machines are not seen from here.

    """
    if launcher is not None:
        if asked == AUTO:
            raise ConfigError(
                f"search.n_jobs=auto counts the cores or GPUs of this machine, and hydra/launcher="
                f"{launcher} sends trials elsewhere; give the size of a batch, like search.n_jobs=8"
            )
        return SideBySide(int(asked))
    most = most or sys.maxsize
    if asked != AUTO:
        count = min(int(asked), most)
        return SideBySide(count, _threads(count, devices, environment))
    if devices or on_mps:
        return SideBySide(min(max(1, len(devices)), most))
    count, note = min(cores(), most), None
    if budget_bytes is not None:
        room = max(1, host_bytes() // budget_bytes)
        if room < count:
            note = (
                f"search.n_jobs=auto: {room} at a time, not one for each of {count} cores: each "
                f"may take {format_bytes(budget_bytes)} of {format_bytes(host_bytes())}"
            )
            count = room
    return SideBySide(count, _threads(count, devices, environment), note)


def _threads(n_jobs: int, devices: Sequence[str], environment: Mapping[str, str]) -> int | None:
    if n_jobs == 1 or devices or THREADS in environment:
        return None
    return max(1, cores() // n_jobs)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
