"""Plots of traffic forecasts: one day against the truth, and the error of every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from expt.files import replace_atomically
from expt.jobs.traffic.metrics import reported_steps
from expt.jobs.traffic.series import Series

SENSORS_SHOWN = 4


def plot_day(
    forecasts: np.ndarray, series: Series, first: np.ndarray, folder: Path, unit: str
) -> Path:
    """Draw forecasts [W, P, N] in `unit` of consecutive windows; `first` [W] is their first step.

    The sensors shown are those whose speed varies most; missing readings are marked on the axis.
    """
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
        axes.plot(
            times, np.where(observed, truth[:, sensor], np.nan), color="0.25", label="measured"
        )
        for minutes, step in shown:
            ahead = step - 1
            reached = first + ahead < len(series.timestamps)
            when = series.timestamps[(first + ahead)[reached]]
            predicted = forecasts[reached, ahead, sensor]
            axes.plot(when, predicted, linewidth=1.2, label=f"{minutes} min ahead")
        missing = times[~observed]
        axes.plot(missing, np.full(len(missing), top / 40), "|", color="tab:red", label="missing")
        axes.set(ylabel=unit, ylim=(0, top))
        axes.set_title(f"sensor {series.sensor_ids[sensor]}", fontsize=9, loc="left")
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
    axes.set(xlabel="minutes ahead", ylabel=f"test MAE ({unit})", xticks=minutes)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Error by horizon", fontsize=11, loc="left")
    return _save(figure, folder / "horizon.png")


def _save(figure: Figure, path: Path) -> Path:
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return path
