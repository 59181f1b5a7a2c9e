from __future__ import annotations

import struct

import pytest
from matplotlib.figure import Figure

from expt.job import Metric
from expt.reports.figures.style import (
    DOTS_PER_INCH,
    WIDTH_INCHES,
    byte_unit,
    draw,
    metric_axis,
    without_outliers,
)
from expt.units import GIB, MIB


def test_a_figure_is_written_twice_in_the_size_asked_for(tmp_path) -> None:
    paths = draw(tmp_path / "plots", "empty", 2.0, lambda figure: None)
    assert [path.name for path in paths] == ["empty.png", "empty.pdf"]
    width, height = struct.unpack(">II", paths[0].read_bytes()[16:24])
    assert (width, height) == (WIDTH_INCHES * DOTS_PER_INCH, 2 * DOTS_PER_INCH)


def test_the_same_figure_is_the_same_file(tmp_path) -> None:
    first = [path.read_bytes() for path in draw(tmp_path, "a", 2.0, lambda figure: None)]
    again = [path.read_bytes() for path in draw(tmp_path, "a", 2.0, lambda figure: None)]
    assert first == again


def test_the_look_ends_with_the_figure(tmp_path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path, "a", 2.0, lambda figure: None)
    assert dict(matplotlib.rcParams) == before


def test_the_unit_goes_by_the_largest() -> None:
    assert byte_unit([10 * MIB, None, GIB]) == ("GiB", GIB)
    assert byte_unit([10 * MIB, 400 * MIB]) == ("MiB", MIB)
    assert byte_unit([]) == ("MiB", MIB)


def test_an_axis_has_the_metrics_unit_and_per_cent_as_per_cent() -> None:
    def labels(metric: Metric) -> tuple[str, str]:
        axes = Figure().subplots()
        metric_axis(axes, metric)
        return axes.get_ylabel(), axes.yaxis.get_major_formatter()(0.875, 0)

    assert labels(Metric("val/mae", label="MAE", unit="km/h"))[0] == "validation MAE (km/h)"
    assert labels(Metric("val/mae", label="MAE"))[0] == "validation MAE"
    share = Metric("test/accuracy", goal="max", label="accuracy", percent=True)
    assert labels(share) == ("test accuracy (%)", "87.5")


def test_what_is_cut_off_is_what_is_bad() -> None:
    axes = Figure().subplots()
    values = [1.0, 1.1, 1.2, 9.0]
    assert without_outliers(axes, values, Metric("a"), reach=5) == 1
    assert axes.get_ylim() == pytest.approx((0.93, 2.0))
    assert without_outliers(axes, [-v for v in values], Metric("a", goal="max"), reach=5) == 1
    assert axes.get_ylim() == pytest.approx((-2.0, -0.93))
    assert without_outliers(axes, values[:3], Metric("a"), reach=5) == 0
