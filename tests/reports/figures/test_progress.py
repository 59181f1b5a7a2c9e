from __future__ import annotations

from expt.reports.figures.progress import best_so_far, plot_progress

GIB = 2**30


def test_only_what_fits_can_be_the_best_so_far(record) -> None:
    runs = [
        record("failed", None, None, state="failed"),
        record("a", 5.0),
        record("too large", 2.0, 9.0),
        record("worse", 5.5),
        record("b", 4.0),
    ]
    assert best_so_far(runs, 2 * GIB) == [(2, 5.0), (5, 4.0)]
    assert best_so_far(runs, None) == [(2, 5.0), (3, 2.0)]
    assert best_so_far([], None) == []


def test_it_is_drawn_from_five_runs_on(record, tmp_path) -> None:
    runs = [record(str(n), 5 - n / 10, 1 + n) for n in range(6)]
    runs += [record("p", None, None, state="predicted_over")]
    assert plot_progress(runs[:4], "val/mae", None, tmp_path) == []
    assert len(plot_progress(runs, "val/mae", 3 * GIB, tmp_path)) == 2
    assert len(plot_progress(runs, "val/mae", 1, tmp_path)) == 2, "nothing fits"
