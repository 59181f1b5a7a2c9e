"""A series in words: the line that a run begins with, and what is wrong with its timestamps.

Letters: `S` time steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from expt.data.series import Series
from expt.protocols import Split
from expt.units import counted

LARGE_SHARE = 0.1
"""Of the windows; a warning says so where more than this are lost to gaps."""
NAMED = 3
"""Sensors that are named at most."""


def describe(series: Series, windows: Mapping[Split, int], possible: int) -> str:
    """Return one line of facts, and a line per warning.

    Args:
        series: what was read.
        windows: how many there are in every split.
        possible: how many there would be without a gap.

    """
    values = series.values
    missing = 100 * float((values == 0).mean())
    line = (
        f"data: {counted(values.shape[1], 'sensor')}, every {interval(series.step_seconds)}, "
        f"{counted(len(values), 'step')}, {missing:.2f} % missing; windows: "
        + ", ".join(f"{count:,} {split}" for split, count in windows.items())
    )
    lost = possible - sum(windows.values())
    if lost:
        line += f"; {lost:,} of {possible:,} ({100 * lost / possible:.1f} %) lost to gaps"
    lines = [line]
    if is_irregular(series) or lost > LARGE_SHARE * possible:
        lines.append(f"data: warning: {deviations(series)}")
    silent = [series.sensor_ids[column] for column in np.flatnonzero(~values.any(axis=0))]
    if silent:
        names = ", ".join(silent[:NAMED]) + (", …" if len(silent) > NAMED else "")
        lines.append(
            f"data: warning: {counted(len(silent), 'sensor')} without any reading: {names}"
        )
    return "\n".join(lines)


def deviations(series: Series) -> str:
    """Return how many time steps differ from the interval, and what to do; "" if none does."""
    steps = np.diff(series.timestamps).astype(np.int64)
    off = int((steps != series.step_seconds).sum())
    if not off:
        return ""
    found = (
        f"the most common interval is {interval(series.step_seconds)}, and {off:,} of "
        f"{counted(len(steps), 'difference')} between timestamps "
        f"{'deviates' if off == 1 else 'deviate'} from it; no window reaches across one. "
    )
    if is_irregular(series):
        return found + "The timestamps are irregular: round or resample them to a fixed interval"
    return found + (
        "Rows are missing: put them in, with 0 or NaN as readings, or try smaller "
        "data.input_steps and data.horizon"
    )


def is_irregular(series: Series) -> bool:
    """Whether some time step is no whole multiple of the interval, as rows left out would make."""
    steps = np.diff(series.timestamps).astype(np.int64)
    return bool((steps % series.step_seconds).any())


def interval(seconds: int) -> str:
    """Return ``5 min``, ``1 h``, ``297 s``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds % size == 0:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
