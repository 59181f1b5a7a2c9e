from __future__ import annotations

from expt.job import Metric
from expt.reports.figures.progress import best_so_far, plot_progress
from expt.result import Outcome

MAE = Metric("val/mae", label="MAE")
GIB = 2**30


def test_only_what_fits_can_be_the_best_so_far(record) -> None:
    runs = [
        record("failed", None, None, outcome=Outcome.failed),
        record("a", 5.0),
        record("too large", 2.0, 9.0),
        record("worse", 5.5),
        record("b", 4.0),
    ]
    assert best_so_far(runs, MAE, 2 * GIB) == [(2, 5.0), (5, 4.0)]
    assert best_so_far(runs, MAE, None) == [(2, 5.0), (3, 2.0)]
    assert best_so_far([], MAE, None) == []


def test_it_is_drawn_from_five_runs_on(record, tmp_path) -> None:
    runs = [record(str(n), 5 - n / 10, 1 + n) for n in range(6)]
    runs += [record("p", None, None, outcome=Outcome.predicted_over)]
    assert plot_progress(runs[:4], MAE, None, tmp_path) == []
    assert len(plot_progress(runs, MAE, 3 * GIB, tmp_path)) == 2
    assert len(plot_progress(runs, MAE, 1, tmp_path)) == 2, "nothing fits"


def test_where_higher_is_better_the_best_so_far_rises(record) -> None:
    runs = [record("a", 0.5), record("worse", 0.4), record("b", 0.75)]
    assert best_so_far(runs, Metric("val/accuracy", goal="max"), None) == [(1, 0.5), (3, 0.75)]
