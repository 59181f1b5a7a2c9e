"""`TrafficData`: a speed series as forecasting samples, kept on the device whole.

Protocol (Li et al., DCRNN, ICLR 2018, and the published code after it): windows of
`input_steps` + `horizon` consecutive steps, cut first and then split in time 70/10/20; scaling
by the training part; errors in the series' own unit on what was measured, over the whole split.
A gap in the timestamps is respected: no window reaches across it.

A batch is gathered on the device by window index; nothing is copied per sample.

Letters: `S` steps in the series, `N` sensors, `W` windows, `B` batch, `T` input steps,
`P` horizon.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expt.drawing import drawn
from expt.errors import DataError
from expt.job import Batch, Split
from expt.jobs.traffic.arrays import made_times
from expt.jobs.traffic.choice import Choice, Columns
from expt.jobs.traffic.metrics import MaskedErrors, check_shape, day_periods, error_metrics
from expt.jobs.traffic.reading import read_series
from expt.jobs.traffic.series import Series
from expt.jobs.traffic.source import named
from expt.jobs.traffic.windows import (
    describe,
    deviations,
    for_forecasts,
    split_windows,
    window_starts,
)

SHIPPED = "expt://"
"""Prefix of a path that means a file shipped inside the package."""
DRAWN = 24
"""Time steps that are drawn at least, of data with few a day."""


class TrafficData:
    """Forecasting samples from one speed series; implements `expt.job.ResidentDataSet`.

    Also `Transformed` and `Predicted`: a trained model forecasts other series of its sensors.

    Args:
        path: the series: npz, HDF5, csv or parquet; ``expt://NAME`` is a shipped file.
        adjacency_path: the sensor graph (pickle, csv, npz) where the series has none.
        where_to_get: said when `path` is not given or does not exist.
        expected_sensors: refuse a file with another number of sensors; null takes any.
        input_steps: steps T a model sees.
        horizon: steps P it forecasts.
        batch_size: windows per optimizer step.
        eval_batch_size: windows per forward pass in evaluation.
        train_fraction: leading part of the windows.
        test_fraction: trailing part; what is between is for validation.
        unit: what the readings are in, ``mph`` or ``km/h``, for labels and records.
        key: name of the array or frame to read, of a file with several; null prefers speed.
        channel: number of the channel to read, of an array [S, N, channels], null is 0; or name
            of a column of a table.
        start: time of the first step, of a file without times.
        step_minutes: minutes from one step to the next, of a file without times.
        columns: what the columns of a table are, ``{"time": …, "sensor": …, "value": …}``, by their
            names; see `Columns`. Null guesses where there is one sensible reading.
        transforms: what `transforms` of the training's data returned, to predict with its model:
            all windows are then for the test, and the last of them end with the series.

    Raises:
        DataError: the file is absent or not what it should be, or too short for one window
            in every split.

    """

    prediction_formats = ("npz", "parquet")

    def __init__(
        self,
        path: str | None,
        adjacency_path: str | None,
        where_to_get: str,
        expected_sensors: int | None,
        input_steps: int,
        horizon: int,
        batch_size: int,
        eval_batch_size: int,
        train_fraction: float,
        test_fraction: float,
        unit: str,
        key: str | None = None,
        channel: int | str | None = None,
        start: str | None = None,
        step_minutes: float | None = None,
        columns: Mapping[str, Any] | None = None,
        transforms: Mapping[str, Any] | None = None,
    ) -> None:
        self.unit, self.fractions = unit, (train_fraction, test_fraction)
        described = None if columns is None else Columns.of(columns)
        self.choice = Choice(key, channel, start, step_minutes, described)
        self.input_steps, self.horizon = input_steps, horizon
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.series = self.read(path, adjacency_path, where_to_get)
        source = path or type(self).__name__
        if not isinstance(self.series, Series):
            raise DataError(
                f"{type(self).__name__}.read returned {type(self.series).__name__}; expected an "
                "expt.jobs.traffic.series.Series, which "
                "Series.from_arrays(values, timestamps) makes"
            )
        num_sensors = self.series.values.shape[1]
        if expected_sensors is not None and num_sensors != expected_sensors:
            raise DataError(
                f"{source}: found {num_sensors} sensors, data.expected_sensors={expected_sensors}; "
                "set data.expected_sensors=null to take any number"
            )
        self._whole: Tensor | None = None  # [W], whether all of a window's target is in the series
        self.split_starts, self.mean, self.std = self._windows(source, transforms)
        self.metrics = error_metrics(horizon, self.series.step_seconds, unit)
        self._on_device(torch.device("cpu"))
        for split, observed in self._observed_targets.items():
            if transforms is None and not observed.any():
                raise DataError(
                    f"{source}: every target reading of the {split} part is missing, so there is "
                    "nothing to compare a forecast with"
                )

    def read(self, path: str | None, adjacency_path: str | None, where_to_get: str) -> Series:
        """Return the series; a subclass with a format of its own overrides this.

        Args:
            path: `data.path`, whatever it means to the subclass.
            adjacency_path: `data.adjacency_path`.
            where_to_get: what to say when there is nothing at `path`.

        Raises:
            DataError: there is nothing to read, or it is not a series.

        """
        if path is None:
            raise DataError(f"data.path is not set. {where_to_get}")
        graph = Path(os.path.expanduser(adjacency_path)) if adjacency_path else None
        if path.startswith(SHIPPED):
            file = Path(str(files("expt.jobs.traffic") / "files" / path.removeprefix(SHIPPED)))
        else:
            file = Path(os.path.expanduser(path))
        try:
            file.stat()
        except FileNotFoundError:
            raise DataError(f"data.path={path}: there is no such file. {where_to_get}") from None
        except (OSError, ValueError):
            pass  # `read_series` says what is wrong
        return read_series(file, graph, self.choice)

    @classmethod
    def problems(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Judge the arguments before any file is read; see `expt.job.Checked`."""
        try:
            inspect.signature(cls.__new__(cls).read).bind("path", "adjacency_path", "where_to_get")
        except TypeError as error:
            return [
                f"{cls.__module__}.{cls.__name__}.read is called as read(self, path, "
                f"adjacency_path, where_to_get), which its signature does not allow: {error}"
            ]
        found = [
            f"data.{name} must be at least 1, got {arguments[name]}"
            for name in ("input_steps", "horizon", "batch_size", "eval_batch_size")
            if name in arguments and arguments[name] < 1
        ]
        train, test = arguments.get("train_fraction", 0.7), arguments.get("test_fraction", 0.2)
        if not (train > 0 and test > 0 and train + test < 1):
            found.append(
                "data.train_fraction and data.test_fraction must be positive and leave a part "
                f"for validation, got {train} and {test}"
            )
        start, minutes = arguments.get("start"), arguments.get("step_minutes")
        if minutes is not None and not minutes * 60 >= 1:
            found.append(f"data.step_minutes must be at least a second, 1/60, got {minutes}")
        elif (start is None) != (minutes is None):
            found.append("data.start and data.step_minutes are given together, or neither")
        elif start is not None:
            try:
                made_times(Choice(start=start, step_minutes=minutes), 1)
            except DataError:
                found.append(f"data.start must be a time like 2018-01-01T00:00, got {start!r}")
        if (columns := arguments.get("columns")) is not None:
            try:
                Choice(None, arguments.get("channel"), start, minutes, Columns.of(columns))
            except DataError as error:
                found.append(str(error))
        if "unit" in arguments and not str(arguments["unit"]).strip():
            found.append("data.unit must name the unit of the readings, like mph or km/h")
        return found

    def to(self, device: torch.device) -> None:
        """Move the whole series and its masks to `device`."""
        self._on_device(device)

    def resident(self) -> list[Tensor]:
        """Return the tensors that stay on the device."""
        kept = [self._speed, self._observed, self._scaled, self._time_of_day, self._day_of_week]
        kept += [self._offsets, *self._starts.values(), *self._observed_targets.values()]
        return kept

    def model_arguments(self) -> Mapping[str, Any]:
        """Return the shapes a model may ask for, and the graph."""
        return {
            "num_sensors": self.series.values.shape[1],
            "input_steps": self.input_steps,
            "horizon": self.horizon,
            "steps_per_day": self.series.steps_per_day,
            "missing_value": -self.mean / self.std,
            "adjacency": self.series.adjacency,
        }

    def size(self, split: Split) -> int:
        """Return the number of windows in a split."""
        return len(self.split_starts[split])

    def gather(self, split: Split, indices: Tensor) -> Batch:
        """Return windows `indices` [B]: inputs [B,T,N] and [B,T], target [B,P,N] in `unit`."""
        steps = self._starts[split][indices].unsqueeze(1) + self._offsets  # [B, T+P]
        past, future = steps[:, : self.input_steps], steps[:, self.input_steps :]
        inputs = {
            "speed": self._scaled[past],
            "observed": self._observed[past],
            "time_of_day": self._time_of_day[past],
            "day_of_week": self._day_of_week[past],
        }
        target = self._speed[future]
        if self._whole is not None:  # to predict: what lies beyond the series or a gap is unknown
            target = torch.where(self._whole[indices, None, None], target, 0.0)
        return Batch(inputs, target)

    def weight(self, split: Split, indices: Tensor) -> Tensor:
        """Return how many target readings of these windows were observed, at least 1."""
        return self._observed_targets[split][indices].sum().clamp(min=1)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the absolute error in `unit` summed over observed targets."""
        check_shape(prediction, batch)
        error = (self.to_speed(prediction) - batch.target).abs()
        return torch.where(batch.target > 0, error, 0.0).sum()

    def accumulator(self) -> MaskedErrors:
        """Return an accumulator in `unit`, per horizon, and per sensor and day of the test part."""
        _, begins, _ = self._days
        return MaskedErrors(self.to_speed, self.horizon, self.series.step_seconds, begins)

    @cached_property
    def _days(self) -> tuple[np.ndarray, list[int], int]:
        """Return the times of the test part's first forecasts [W], and their `day_periods`."""
        times = self.series.timestamps[self.split_starts["test"] + self.input_steps]
        return times, *day_periods(times)

    def transforms(self) -> Mapping[str, Any]:
        """Return what a forecast needs of the training part; see `expt.job.Transformed`."""
        return {
            "mean": self.mean,
            "std": self.std,
            "unit": self.unit,
            "sensor_ids": list(self.series.sensor_ids),
            "step_seconds": self.series.step_seconds,
        }

    def write_predictions(
        self, split: Split, predictions: Tensor, indices: Tensor, path: Path
    ) -> None:
        """Write forecasts [W, P, N] of a split's windows in `unit`, with their times."""
        from expt.jobs.traffic.forecasts import Forecasts

        first = self.split_starts[split][indices.numpy()] + self.input_steps - 1
        Forecasts(
            self.to_speed(predictions).numpy(),
            self.series.timestamps[first],
            self.series.step_seconds,
            self.series.sensor_ids,
            self.unit,
        ).write(path)

    def plots(
        self, predict: Callable[[Batch], Tensor], metrics: MaskedErrors, folder: Path
    ) -> list[Path]:
        """Draw one day of the test part for a few sensors, and errors by step, and by sensor.

        Of data with few steps a day `DRAWN` steps are drawn. Of a mere forecast there is no error.
        """
        return drawn(
            lambda: self._plot_day(predict, folder),
            lambda: self._plot_horizon(metrics, folder),
            lambda: self._plot_sensors(metrics, folder),
        )

    def _plot_day(self, predict: Callable[[Batch], Tensor], folder: Path) -> Path:
        from expt.jobs.traffic.figures import plot_day

        count = min(max(self.series.steps_per_day, DRAWN), self.size("test"))
        windows = torch.arange(count, device=self._offsets.device)
        forecasts = [
            self.to_speed(predict(self.gather("test", chunk)))
            for chunk in windows.split(self.eval_batch_size)
        ]
        first = self.split_starts["test"][:count] + self.input_steps
        return plot_day(torch.cat(forecasts).cpu().numpy(), self.series, first, folder, self.unit)

    def _plot_horizon(self, metrics: MaskedErrors, folder: Path) -> Path | None:
        from expt.jobs.traffic.figures import plot_horizon

        if not self._observed_targets["test"].any():
            return None
        return plot_horizon(metrics.by_step(), self.series.step_seconds, folder, self.unit)

    def _plot_sensors(self, metrics: MaskedErrors, folder: Path) -> Path | None:
        from expt.jobs.traffic.figures import plot_sensors

        if not self._observed_targets["test"].any():
            return None
        sums = metrics.by_sensor().numpy()
        times, begins, days = self._days
        return plot_sensors(
            sums, times[begins[: len(sums)]], days, self.series.sensor_ids, folder, self.unit
        )

    def to_speed(self, prediction: Tensor) -> Tensor:
        """Undo the scaling of a prediction; the result is in `unit`."""
        return prediction.float() * self.std + self.mean

    def describe(self) -> str:
        """Return a line of facts about the series, and one line per warning."""
        sizes = {split: len(starts) for split, starts in self.split_starts.items()}
        possible = len(self.series.values) - (self.input_steps + self.horizon) + 1
        series = self.series
        if self._whole is not None:
            del sizes["train"], sizes["val"]
            read = len(series.values) - self.horizon  # what is forecast after it was not read
            series = dataclasses.replace(
                series, values=series.values[:read], timestamps=series.timestamps[:read]
            )
        return describe(series, sizes, possible, self.unit)

    def fingerprint(self) -> str:
        """Return a short hash of the series, and of what is forecast and compared of it."""
        told = f"{self.series.fingerprint()} {self.horizon} {self.fractions} {self.unit}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _windows(
        self, source: str, transforms: Mapping[str, Any] | None
    ) -> tuple[dict[Split, np.ndarray], float, float]:
        """Return where the windows of each split begin, and mean and deviation to scale by."""
        if transforms is not None:
            with named(source):
                if self.unit != (trained := transforms.get("unit", self.unit)):
                    raise DataError(
                        f"readings in {self.unit}, and the model was trained on readings in "
                        f"{trained}; convert them, or say data.unit={trained} if they are in that"
                    )
                self.series, starts, whole = for_forecasts(
                    self.series, transforms, self.input_steps, self.horizon
                )
                self._whole = torch.from_numpy(whole)
                splits: dict[Split, np.ndarray] = dict.fromkeys(("train", "val"), starts[:0])
                return splits | {"test": starts}, transforms["mean"], transforms["std"]
        starts = window_starts(self.series, self.input_steps + self.horizon)
        splits = split_windows(starts, *self.fractions, source, deviations(self.series))
        with named(source):
            _ = self.series.steps_per_day  # refused here, before anything is built for it
            return splits, *self._scaling(splits["train"])

    def _scaling(self, train: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of the observed readings of the training part."""
        last = int(train[-1]) + self.input_steps
        observed = self.series.values[:last]
        observed = observed[observed > 0].astype(np.float64)
        if observed.size == 0 or observed.std() == 0:
            raise DataError("the training part holds no two different readings to scale by")
        return float(observed.mean()), float(observed.std())

    def _on_device(self, device: torch.device) -> None:
        series = self.series
        self._speed = torch.from_numpy(series.values).to(device)  # [S, N], 0 = missing
        self._observed = self._speed > 0
        self._scaled = torch.where(self._observed, (self._speed - self.mean) / self.std, 0.0)
        seconds = (series.timestamps - series.timestamps.astype("datetime64[D]")).astype(np.int64)
        days = series.timestamps.astype("datetime64[D]").astype(np.int64)
        self._time_of_day = torch.from_numpy(seconds // series.step_seconds).to(device)
        self._day_of_week = torch.from_numpy((days + 3) % 7).to(device)  # 1970-01-01: Thursday
        self._starts = {
            split: torch.from_numpy(starts).to(device)
            for split, starts in self.split_starts.items()
        }
        self._offsets = torch.arange(self.input_steps + self.horizon, device=device)
        observed_before = torch.zeros(len(series.values) + 1, dtype=torch.int64, device=device)
        observed_before[1:] = self._observed.sum(dim=1).cumsum(0)
        self._observed_targets = {
            split: observed_before[starts + self.input_steps + self.horizon]
            - observed_before[starts + self.input_steps]
            for split, starts in self._starts.items()
        }
        if self._whole is not None:
            self._whole = self._whole.to(device)
            self._observed_targets["test"] *= self._whole
