"""Plots of traffic forecasts: a day against the truth, and errors by step and by sensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from expt.files import replace_atomically
from expt.jobs.traffic.metrics import reported_steps
from expt.jobs.traffic.series import Series

SENSORS_SHOWN = 4
AS_WRITTEN: dict[str, Any] = {"parse_math": False}
"""Of texts with names of sensors and units, in which a $ begins no formula."""
ROWS = 40
"""Sensors that the map of errors has at most."""
USUAL = 0.98
"""Share of the map's fields inside its colours; the few readings of a failing sensor are beyond."""


def plot_day(
    forecasts: np.ndarray, series: Series, first: np.ndarray, folder: Path, unit: str
) -> Path:
    """Draw forecasts [W, P, N] in `unit` of consecutive windows; `first` [W] is their first step.

    The sensors shown are those whose speed varies most; missing readings are marked on the axis.
    """
    issued, step_seconds = series.timestamps[first - 1], np.timedelta64(series.step_seconds, "s")
    truth = series.values[first]  # [W, N], 0 = missing
    spread = np.ma.masked_equal(truth, 0).std(axis=0).filled(0)
    sensors = np.argsort(spread)[::-1][:SENSORS_SHOWN]
    figure = Figure(figsize=(10, 2.2 * len(sensors) + 0.6), layout="constrained")
    rows = figure.subplots(len(sensors), 1, sharex=True, squeeze=False)[:, 0]
    times = series.timestamps[first]
    reported = list(reported_steps(forecasts.shape[1], series.step_seconds).items())
    shown = dict([reported[0], reported[-1]]).items()
    top = 1.15 * float(truth[:, sensors].max()) or 1.0
    for axes, sensor in zip(rows, sensors, strict=True):
        observed = truth[:, sensor] > 0
        measured = np.where(observed, truth[:, sensor], np.nan)
        axes.plot(*_with_gaps(times, measured, step_seconds), color="0.25", label="measured")
        for minutes, step in shown:
            predicted = _with_gaps(
                issued + step * step_seconds, forecasts[:, step - 1, sensor], step_seconds
            )
            axes.plot(*predicted, linewidth=1.2, label=f"{minutes} min ahead")
        missing = times[~observed]
        axes.plot(missing, np.full(len(missing), top / 40), "|", color="tab:red", label="missing")
        axes.set_ylim(0, top)
        axes.set_ylabel(unit, **AS_WRITTEN)
        name = f"sensor {series.sensor_ids[sensor]}"
        axes.set_title(name, fontsize=9, loc="left", **AS_WRITTEN)
        axes.spines[["top", "right"]].set_visible(False)
    locator = AutoDateLocator()
    rows[-1].xaxis.set_major_locator(locator)
    rows[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
    rows[0].legend(frameon=False, ncols=4, fontsize=8, loc="lower right")
    rows[-1].set_xlabel(f"{str(times[0])[:16]} to {str(times[-1])[:16]}, test part")
    figure.suptitle("Forecast against truth (missing readings count in no error)", fontsize=11)
    return _save(figure, folder / "forecast.png")


def plot_horizon(mae_by_step: Sequence[float], step_seconds: int, folder: Path, unit: str) -> Path:
    """Draw the test MAE of every forecast step."""
    minutes = [(step + 1) * step_seconds / 60 for step in range(len(mae_by_step))]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, mae_by_step, "o-")
    for step in reported_steps(len(mae_by_step), step_seconds).values():
        at, value = minutes[step - 1], mae_by_step[step - 1]
        axes.annotate(
            f"{value:.2f}", (at, value), textcoords="offset points", xytext=(0, 7), ha="center"
        )
    axes.set(xlabel="minutes ahead", xticks=minutes)
    axes.set_ylabel(f"test MAE ({unit})", **AS_WRITTEN)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Error by horizon", fontsize=11, loc="left")
    return _save(figure, folder / "horizon.png")


def plot_sensors(
    sums: np.ndarray,
    times: np.ndarray,
    days: int,
    sensor_ids: Sequence[str],
    folder: Path,
    unit: str,
) -> Path:
    """Draw the mean error by sensor and day, and the MAE, of the sensors that err to one side most.

    A sensor that was moved, or whose level has changed, is a row of one colour at the top; a day
    that is unlike all others is a column.

    Args:
        sums: of |error|, of error (forecast - truth), and of readings, [periods, 3, N].
        times: of the first forecast in each period, [periods].
        days: in a period.
        sensor_ids: names of the N sensors.
        folder: of the figure.
        unit: of the errors.

    """
    whole = sums.sum(axis=0)
    bias = _ratio(sums[:, 1], sums[:, 2]).T  # [N, periods]
    mae = _ratio(whole[0], whole[2])
    one_sided = _ratio((sums[:, 2].T * np.nan_to_num(bias) ** 2).sum(axis=1), whole[2])
    seen = np.flatnonzero(whole[2] > 0)
    rows = seen[np.argsort(-one_sided[seen], kind="stable")][:ROWS]
    height = 0.2 * len(rows) + 1.5
    figure = Figure(figsize=(10, height), layout="constrained")
    grid, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    top = float(np.nanquantile(np.abs(bias[rows]), USUAL)) or 1.0
    image = grid.imshow(
        np.ma.masked_invalid(bias[rows]), aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top,
        interpolation="nearest",
    )  # fmt: skip
    grid.set_facecolor("0.85")
    names = [sensor_ids[row] for row in rows]
    grid.set_yticks(range(len(rows)), names, fontsize=7, **AS_WRITTEN)
    shown = range(0, len(times), -(-len(times) // 8))
    grid.set_xticks(shown, [str(times[place])[:10] for place in shown], fontsize=8)
    each = "" if days == 1 else f", {days} days a column"
    grid.set_xlabel(f"day of the first forecast{each} (grey: nothing measured)")
    of = ""
    if len(rows) < len(sensor_ids):
        of = f", the {len(rows)} most one-sided of {len(sensor_ids)} sensors"
    grid.set_title(f"Mean error by sensor and day{of}", fontsize=11, loc="left")
    colors = figure.colorbar(image, ax=grid, pad=0.01, extend="both")
    colors.set_label(f"forecast too low | too high ({unit})", **AS_WRITTEN)
    bars.barh(range(len(rows)), mae[rows], color="0.55")
    overall = float(whole[0].sum() / whole[2].sum())
    bars.axvline(overall, color="tab:red", linewidth=1)
    bars.set_xlabel(f"MAE ({unit})", **AS_WRITTEN)
    bars.set_title(f"all: {overall:.2f}", fontsize=9, loc="left", color="tab:red")
    bars.tick_params(labelleft=False, left=False)
    bars.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder / "sensors.png")


def _with_gaps(
    times: np.ndarray, values: np.ndarray, step: np.timedelta64
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a line that is broken where a step is left out."""
    breaks = np.flatnonzero(np.diff(times) > step) + 1
    return np.insert(times, breaks, times[breaks]), np.insert(values, breaks, np.nan)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return means, NaN where nothing was counted."""
    found: np.ndarray = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return found


def _save(figure: Figure, path: Path) -> Path:
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return path
