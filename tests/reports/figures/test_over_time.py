from __future__ import annotations

import pytest

from expt.job import Metric
from expt.reports.figures.over_time import best_over_time, clock, plot_over_time
from expt.result import Outcome

MAE = Metric("val/mae", label="MAE")
GIB = 2**30


def test_a_pause_does_not_count(record) -> None:
    runs = [
        record("a", 5.0, started=1000.0, ended=1060.0),
        record("b", 4.0, started=1030.0, ended=1100.0),  # beside the first
        record("c", 3.0, started=9100.0, ended=9130.0),  # after a stop of 8000 s
    ]
    elapsed = clock(runs)
    assert [elapsed(at) for at in (1000.0, 1100.0, 5000.0, 9100.0, 9130.0)] == [
        0,
        100,
        100,
        100,
        130,
    ]
    with pytest.raises(ValueError, match="no run has both"):
        clock([record("d", 1.0)])


def test_a_figure_counts_from_the_end_of_its_run(record) -> None:
    runs = [
        record("slow", 3.0, started=1000.0, ended=1090.0),
        record("quick", 4.0, started=1010.0, ended=1030.0),
        record("too large", 1.0, 9.0, started=1030.0, ended=1050.0),
        record("worse", 4.5, started=1050.0, ended=1060.0),
        record("runs", None, None, started=1060.0, outcome=Outcome.unfinished),
    ]
    assert best_over_time(runs, MAE, 2 * GIB) == [(30.0, 4.0), (90.0, 3.0)]
    assert best_over_time(runs, Metric("val/a", goal="max"), None) == [(30.0, 4.0), (60.0, 4.5)]
    assert best_over_time([], MAE, None) == []


def test_it_is_drawn_from_five_runs_on(record, tmp_path) -> None:
    runs = [
        record(str(n), 5 - n / 10, started=1e9 + 60 * n, ended=1e9 + 60 * n + 50) for n in range(6)
    ]
    runs += [
        record("p", None, None, outcome=Outcome.predicted_over, started=1e9 + 400, ended=1e9 + 401)
    ]
    assert plot_over_time(runs[:4], MAE, None, tmp_path) == []
    assert len(plot_over_time(runs, MAE, 3 * GIB, tmp_path)) == 2
    assert plot_over_time(runs, MAE, 1, tmp_path) == [], "nothing fits"
