from __future__ import annotations

import pytest

from expt.reports.figures.prediction import accuracy, plot_prediction


def test_errors_are_signed_and_in_per_cent(record) -> None:
    runs = [
        record("a", 1.0, prediction_error=0.02),
        record("b", 1.0, prediction_error=-0.05),
        record("c", 1.0, prediction_error=None),
        record("d", 1.0, prediction_error=0.01),
    ]
    found = accuracy(runs)
    assert found.errors == pytest.approx((2.0, -5.0, 1.0))
    assert (found.median, found.worst) == pytest.approx((2.0, -5.0))
    assert found.words() == "Median error 2.00 % over 3 runs, worst -5.00 %."
    assert accuracy(runs[2:3]) is None


def test_it_is_drawn(record, tmp_path) -> None:
    runs = [record(str(n), 1.0, 1 + n * n, prediction_error=n / 100 - 0.02) for n in range(6)]
    assert len(plot_prediction(runs, tmp_path)) == 2
    assert len(plot_prediction([record("exact", 1.0, prediction_error=0.0)], tmp_path)) == 2
    assert plot_prediction([record("none", 1.0, prediction_error=None)], tmp_path) == []
