"""Letters: `W` windows, `P` horizon, `N` sensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import expt.jobs.traffic.figures as module
from expt.errors import StorageError
from expt.jobs.traffic.figures import plot_day, plot_horizon, plot_sensors
from expt.jobs.traffic.series import Series

START = np.datetime64("2012-03-01T00:00:00")


def series(steps: int = 400, sensors: int = 6, step: int = 300) -> Series:
    draw = np.random.default_rng(0)
    # The sensors vary the more the higher their number.
    values = 50 + draw.standard_normal((steps, sensors)) * np.arange(1, sensors + 1)
    values[draw.random(values.shape) < 0.05] = 0
    return Series.from_arrays(values.clip(min=0), START + np.arange(steps) * np.timedelta64(step))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are drawn."""
    drawn: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(module, "Figure", Kept)
    return drawn


def assert_png(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert len(content) > 10_000


def line(figure: Figure, axes: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [one for one in figure.axes[axes].lines if one.get_label() == label]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_a_day_against_the_truth(tmp_path: Path, figures: list[Figure]) -> None:
    speeds = series()
    first = np.arange(100, 388)
    forecasts = np.random.default_rng(1).uniform(30, 70, (288, 12, 6))
    path = plot_day(forecasts, speeds, first, tmp_path / "new", "mph")
    assert path == tmp_path / "new" / "forecast.png"
    assert_png(path)
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["sensor 5", "sensor 4", "sensor 3", "sensor 2"]  # those that vary most
    truth = speeds.values[first, 5]
    when, measured = line(figure, 0, "measured")
    np.testing.assert_array_equal(when, speeds.timestamps[first])
    np.testing.assert_array_equal(measured, np.where(truth > 0, truth, np.nan))
    marked, _ = line(figure, 0, "missing")
    np.testing.assert_array_equal(marked, speeds.timestamps[first][truth == 0])
    assert len(marked) > 0


@pytest.mark.parametrize(("minutes", "ahead"), [(15, 2), (60, 11)])
def test_a_forecast_stands_at_the_time_it_is_for(
    tmp_path: Path, figures: list[Figure], minutes: int, ahead: int
) -> None:
    speeds = series()
    first = np.arange(100, 389)
    steps = first[:, None] + np.arange(12)
    perfect = speeds.values[steps]  # [W, P, N]
    plot_day(perfect, speeds, first, tmp_path, "mph")
    when, predicted = line(figures[0], 0, f"{minutes} min ahead")
    np.testing.assert_array_equal(when, speeds.timestamps[first + ahead])
    np.testing.assert_array_equal(predicted, speeds.values[first + ahead, 5])


def test_across_a_gap_forecasts_stand_at_their_times_and_lines_are_broken(
    tmp_path: Path, figures: list[Figure]
) -> None:
    kept = np.r_[0:150, 200:400]
    whole = series()
    speeds = Series.from_arrays(whole.values[kept], whole.timestamps[kept])
    first = np.r_[100:151, 162:300]  # the windows before 150 are forecast into the gap
    plot_day(np.full((len(first), 12, 6), 50.0), speeds, first, tmp_path, "mph")
    for label, distance in (("15 min ahead", 3), ("60 min ahead", 12)):
        when, values = line(figures[0], 0, label)
        expected = speeds.timestamps[first - 1] + 300 * distance
        np.testing.assert_array_equal(when[~np.isnan(values)], expected)
        assert np.isnan(values).sum() == 1
    when, values = line(figures[0], 0, "measured")
    broken = np.flatnonzero(np.diff(when.astype("M8[s]").astype(int)) > 300) + 1
    assert len(broken) == 2 and np.isnan(values[broken]).all()


def test_names_and_units_are_no_formulas(tmp_path: Path, figures: list[Figure]) -> None:
    names = ("I-5 $\\x$", "a_{$b$", "$$")
    values = np.random.default_rng(0).uniform(30, 60, (50, 3))
    speeds = Series.from_arrays(values, START + np.arange(50) * np.timedelta64(300), names)
    plot_day(np.full((20, 3, 3), 50.0), speeds, np.arange(10, 30), tmp_path, "$\\y$")
    plot_horizon([1.0, 2.0], 300, tmp_path, "$\\y$")
    plot_sensors(sums(5, 3), speeds.timestamps[:5], 1, names, tmp_path, "$\\y$")
    assert {axes.get_title(loc="left") for axes in figures[0].axes} == {
        f"sensor {n}" for n in names
    }


@pytest.mark.parametrize("fastest", [0.9, 65.0, 130.0])
def test_the_axis_holds_any_unit(tmp_path: Path, figures: list[Figure], fastest: float) -> None:
    values = np.linspace(0.5, 1, 100)[:, None] * fastest
    speeds = Series.from_arrays(values, START + np.arange(100) * np.timedelta64(300))
    plot_day(np.full((50, 3, 1), fastest), speeds, np.arange(50, 100), tmp_path, "km/h")
    axes = figures[0].axes[0]
    assert axes.get_ylabel() == "km/h"
    assert fastest < axes.get_ylim()[1] < 1.3 * fastest


def test_fewer_sensors_steps_and_no_missing_reading(tmp_path: Path, figures: list[Figure]) -> None:
    values = np.random.default_rng(0).uniform(30, 60, (50, 1))
    speeds = Series.from_arrays(values, START + np.arange(50) * np.timedelta64(300))
    plot_day(np.full((20, 3, 1), 50.0), speeds, np.arange(10, 30), tmp_path, "mph")
    assert len(figures[0].axes) == 1
    labels = {one.get_label() for one in figures[0].axes[0].lines}
    assert labels == {"measured", "5 min ahead", "15 min ahead", "missing"}


def test_the_error_of_every_step(tmp_path: Path, figures: list[Figure]) -> None:
    errors = [2.0 + 0.1 * step for step in range(12)]
    path = plot_horizon(errors, 300, tmp_path, "km/h")
    assert path == tmp_path / "horizon.png"
    assert_png(path)
    axes = figures[0].axes[0]
    assert axes.get_ylabel() == "test MAE (km/h)"
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(5, 65, 5))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), errors)
    noted = [(note.xy[0], note.get_text()) for note in axes.texts]
    assert noted == [(15, "2.20"), (30, "2.50"), (60, "3.10")]


def test_an_hourly_series_shows_its_own_horizons(tmp_path: Path, figures: list[Figure]) -> None:
    speeds = series(steps=100, step=3600)
    plot_day(np.full((24, 12, 6), 50.0), speeds, np.arange(50, 74), tmp_path, "mph")
    plot_horizon([2.0 + 0.1 * step for step in range(12)], 3600, tmp_path, "mph")
    labels = {one.get_label() for one in figures[0].axes[0].lines}
    assert labels == {"measured", "60 min ahead", "720 min ahead", "missing"}
    assert [note.xy[0] for note in figures[1].axes[0].texts] == [60, 180, 360, 720]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(StorageError, match=r"horizon\.png"):
        plot_horizon([1.0, 2.0], 300, tmp_path / "plots", "mph")


def sums(periods: int, sensors: int) -> np.ndarray:
    """Return errors of 2 at 100 readings of every sensor and period, as many above as below."""
    found = np.zeros((periods, 3, sensors))
    found[:, 0], found[:, 2] = 200, 100
    return found


def test_a_sensor_whose_level_has_changed_is_the_first_row(
    tmp_path: Path, figures: list[Figure]
) -> None:
    errors = sums(10, 6)
    errors[7:, 0, 4], errors[7:, 1, 4] = 1500, -1500
    errors[2, :, 1] = 0  # nothing measured
    errors[3, :, 2] = [40, 40, 1]  # a single reading, of a sensor that failed
    times = START + np.arange(10) * np.timedelta64(1, "D")
    path = plot_sensors(errors, times, 1, [f"s{n}" for n in range(6)], tmp_path, "mph")
    assert path == tmp_path / "sensors.png"
    assert_png(path)
    grid, bars = figures[0].axes[:2]
    assert [label.get_text() for label in grid.get_yticklabels()][:2] == ["s4", "s2"]
    field = grid.images[0].get_array()
    assert field is not None and field.shape == (6, 10)
    np.testing.assert_allclose(field[0], [0] * 7 + [-15] * 3)
    assert field[1, 3] == 40
    (row,) = [n for n, label in enumerate(grid.get_yticklabels()) if label.get_text() == "s1"]
    assert [bool(hidden) for hidden in np.ma.getmaskarray(field)[row]] == [
        column == 2 for column in range(10)
    ]
    assert bars.patches[0].get_width() == pytest.approx((7 * 200 + 3 * 1500) / 1000)
    assert bars.get_title(loc="left").startswith("all: 2.")


def test_of_many_sensors_the_most_one_sided_are_drawn(
    tmp_path: Path, figures: list[Figure]
) -> None:
    errors = sums(50, 70)
    errors[:, 1] = np.arange(70)  # the last is the most one-sided
    errors[:, :, 69] = 0  # but was never measured
    times = START + np.arange(50) * np.timedelta64(3, "D")
    plot_sensors(errors, times, 3, [str(n) for n in range(70)], tmp_path, "km/h")
    grid = figures[0].axes[0]
    assert grid.get_title(loc="left") == (
        "Mean error by sensor and day, the 40 most one-sided of 70 sensors"
    )
    assert grid.get_xlabel().startswith("day of the first forecast, 3 days a column")
    assert [label.get_text() for label in grid.get_yticklabels()] == [
        str(n) for n in range(68, 28, -1)
    ]
    field = grid.images[0].get_array()
    assert field is not None and field.shape == (40, 50)
    np.testing.assert_allclose(field[0], 0.68)
    shown = [label.get_text() for label in grid.get_xticklabels()]
    assert shown[:2] == [str(times[0])[:10], str(times[7])[:10]]
