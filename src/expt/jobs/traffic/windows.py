"""Windows of a series: where each begins, none across a gap, and which split it belongs to.

Letters: `W` windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from expt.errors import DataError
from expt.job import Split
from expt.jobs.traffic.scale import scale_warnings
from expt.jobs.traffic.series import Series
from expt.units import counted


def window_starts(series: Series, length: int) -> np.ndarray:
    """Return the first step of every run of `length` steps without a gap, int64 [W]."""
    if len(series.timestamps) < length:
        return np.empty(0, dtype=np.int64)
    seconds = series.timestamps.astype(np.int64)
    starts = np.arange(len(seconds) - length + 1, dtype=np.int64)
    span = (length - 1) * series.step_seconds
    irregular = np.concatenate(([0], np.cumsum(np.diff(seconds) != series.step_seconds)))
    whole = seconds[starts + length - 1] - seconds[starts] == span
    unbroken: np.ndarray = starts[whole & (irregular[starts + length - 1] == irregular[starts])]
    return unbroken


def split_windows(
    starts: np.ndarray,
    train_fraction: float,
    test_fraction: float,
    path: str | None,
    deviations: str = "",
) -> dict[Split, np.ndarray]:
    """Cut the windows [W] in time order; sizes are rounded as in the published code.

    Raises `DataError` when a split would be empty; `deviations` says what the gaps are, if any.
    """
    num_train = round(len(starts) * train_fraction)
    num_test = round(len(starts) * test_fraction)
    num_val = len(starts) - num_train - num_test
    if min(num_train, num_val, num_test) < 1:
        longer = "a longer series, or smaller data.input_steps and data.horizon, would do"
        remedy = deviations or longer
        raise DataError(
            f"{path}: only {counted(len(starts), 'window')} without a gap, which leaves "
            f"{num_train} for training, {num_val} for validation, {num_test} for the test; {remedy}"
        )
    return {
        "train": starts[:num_train],
        "val": starts[num_train : num_train + num_val],
        "test": starts[num_train + num_val :],
    }


def for_forecasts(
    series: Series, transforms: Mapping[str, Any], input_steps: int, horizon: int
) -> tuple[Series, np.ndarray, np.ndarray]:
    """Return a series to forecast, its windows [W], and whether all of a window's target is known.

    A window needs only its input without a gap. The series gets the sensors of the training, in
    their order, and `horizon` empty steps at its end, which the last window forecasts.

    Args:
        series: as it was read.
        transforms: of the training's data: `sensor_ids`, `step_seconds`.
        input_steps: steps that a model sees.
        horizon: steps that it forecasts.

    Raises:
        DataError: a sensor is not there, the interval is another, or no window is whole.

    """
    series = _with_sensors(series, list(transforms["sensor_ids"]))
    if series.step_seconds != transforms["step_seconds"]:
        raise DataError(
            f"a reading every {interval(series.step_seconds)}, and the model was trained on one "
            f"every {interval(transforms['step_seconds'])}; resample to that"
        )
    starts = window_starts(series, input_steps)
    if not starts.size:
        raise DataError(
            f"no {input_steps} readings without a gap, of {counted(len(series.values), 'step')}; "
            "a forecast needs as many as the model was trained on"
        )
    whole = np.isin(starts, window_starts(series, input_steps + horizon))
    after = np.arange(1, horizon + 1) * np.timedelta64(series.step_seconds, "s")
    empty = np.zeros((horizon, series.values.shape[1]), np.float32)
    longer = dataclasses.replace(
        series,
        values=np.concatenate([series.values, empty]),
        timestamps=np.concatenate([series.timestamps, series.timestamps[-1] + after]),
    )
    return longer, starts, whole


def _with_sensors(series: Series, wanted: list[str]) -> Series:
    """Return the series with these sensors in this order.

    Numbers from 0 on, of a file without ids, stand for as many sensors of other names in their
    order.
    """
    found = list(series.sensor_ids)
    if found == wanted:
        return series
    numbers = [str(number) for number in range(len(wanted))]
    if numbers in (found, wanted) and len(found) == len(wanted) and set(found) != set(wanted):
        unnamed = "the file" if found == numbers else "the training's file"
        note = f"{unnamed} has no sensor ids: its sensors are taken in the order of the other's"
        return dataclasses.replace(series, notes=(*series.notes, note))
    absent = [name for name in wanted if name not in found]
    if absent:
        raise DataError(
            f"{len(absent)} of the {len(wanted)} sensors that the model was trained on are not in "
            f"it: {', '.join(absent[:NAMED])}{', …' if absent[NAMED:] else ''}; it has "
            f"{', '.join(found[:NAMED])}{', …' if found[NAMED:] else ''}"
        )
    order = [found.index(name) for name in wanted]
    return dataclasses.replace(
        series,
        values=np.ascontiguousarray(series.values[:, order]),
        sensor_ids=tuple(wanted),
        adjacency=None if series.adjacency is None else series.adjacency[np.ix_(order, order)],
        locations=None if series.locations is None else series.locations[order],
    )


LARGE_SHARE = 0.1
"""Of the windows; a warning says so where more than this are lost to gaps."""
NAMED = 3
"""Sensors that are named at most."""


def describe(series: Series, windows: Mapping[Split, int], possible: int, unit: str = "mph") -> str:
    """Return one line of facts, one per note on what was read, and one per warning.

    Args:
        series: what was read.
        windows: how many there are in every split.
        possible: how many there would be without a gap.
        unit: of the readings.

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
    lines = [line, *(f"data: {note}" for note in series.notes)]
    if is_irregular(series) or lost > LARGE_SHARE * possible:
        lines.append(
            f"data: warning: {deviations(series)}. With another data.input_steps other windows are "
            "left to test on, whose figures do not compare with these"
        )
    silent = [series.sensor_ids[column] for column in np.flatnonzero(~values.any(axis=0))]
    if silent:
        names = ", ".join(silent[:NAMED]) + (", …" if len(silent) > NAMED else "")
        lines.append(
            f"data: warning: {counted(len(silent), 'sensor')} without any reading: {names}"
        )
    lines += [f"data: warning: {warning}" for warning in scale_warnings(series, unit)]
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
