from __future__ import annotations

import pytest

from expt.job import Metric
from expt.reports.figures.trade_off import best_run, front, plot_trade_off
from expt.result import Outcome

MAE = Metric("val/mae", label="MAE")
ACCURACY = Metric("val/accuracy", goal="max", label="accuracy", percent=True)
GIB = 2**30


def test_the_front_holds_what_no_other_beats_in_both(record) -> None:
    runs = [
        record("small", 5.0, 1.0),
        record("beaten", 5.1, 1.5),
        record("middle", 4.0, 2.0),
        record("same peak, worse", 4.2, 2.0),
        record("same error, larger", 4.0, 2.5),
        record("large", 3.0, 4.0),
        record("no peak", 1.0, None),
        record("failed", None, 0.1, outcome=Outcome.failed),
    ]
    assert [r.name for r in front(runs, MAE)] == ["small", "middle", "large"]
    assert [r.name for r in front(reversed(runs), MAE)] == ["small", "middle", "large"]
    assert front([], MAE) == []


def test_the_best_is_inside_the_budget(record) -> None:
    runs = [record("small", 5.0, 1.0), record("middle", 4.0, 2.0), record("large", 3.0, 4.0)]
    assert best_run(runs, MAE, None).name == "large"
    assert best_run(runs, MAE, 3 * GIB).name == "middle"
    assert best_run(runs, MAE, GIB // 2) is None


@pytest.mark.parametrize("count", [1, 3, 40])
def test_it_is_drawn_with_every_kind_of_end(record, tmp_path, count) -> None:
    runs = [record(f"r{n}", 4 + n / 10, 1 + n) for n in range(count)]
    runs += [
        record("diverged", 400.0, 1.0),
        record("o", None, None, outcome=Outcome.out_of_memory, predicted_peak_bytes=9 * GIB),
        record("p", None, None, outcome=Outcome.predicted_over, predicted_peak_bytes=20 * GIB),
        record("q", None, 2.0, outcome=Outcome.pruned),
        record("f", None, None, outcome=Outcome.failed),
    ]
    files = plot_trade_off(runs, MAE, 3 * GIB, tmp_path)
    assert [path.name for path in files] == ["trade_off.png", "trade_off.pdf"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert files[1].read_bytes().startswith(b"%PDF")


def test_nothing_is_drawn_of_runs_without_figures(record, tmp_path) -> None:
    assert (
        plot_trade_off([record("f", None, None, outcome=Outcome.failed)], MAE, None, tmp_path) == []
    )
    assert list(tmp_path.iterdir()) == []


def test_where_higher_is_better_the_front_rises(record) -> None:
    runs = [record("small", 0.5, 1.0), record("beaten", 0.4, 1.5), record("large", 0.75, 4.0)]
    assert [r.name for r in front(runs, ACCURACY)] == ["small", "large"]
    assert best_run(runs, ACCURACY, None).name == "large"
    assert best_run(runs, ACCURACY, 2 * GIB).name == "small"


def test_the_worst_are_where_the_edge_is(record, tmp_path) -> None:
    runs = [record(f"r{n}", 0.5 + n / 100, 1 + n) for n in range(12)]
    runs += [record("bad", -9.0, 1.0), record("p", None, 2.0, outcome=Outcome.pruned)]
    assert len(plot_trade_off(runs, ACCURACY, 3 * GIB, tmp_path)) == 2


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, as objects."""
    import expt.reports.figures.trade_off as module

    kept = []
    own = module.draw

    def draw(folder, name, height, onto):
        def seen(figure) -> None:
            onto(figure)
            kept.append(figure)

        return own(folder, name, height, seen)

    monkeypatch.setattr(module, "draw", draw)
    return kept


def test_labels_do_not_cover_each_other(record, tmp_path, figures) -> None:
    runs = [record(f"run number {n}", 4 + n / 1000, 1 + n / 100) for n in range(6)]
    plot_trade_off(runs, MAE, 3 * GIB, tmp_path)
    (figure,) = figures
    words = [text for text in figure.axes[0].texts if "run number" in text.get_text()]
    assert len(words) >= 3 and words[0].get_text().startswith("best: ")
    boxes = [word.get_window_extent() for word in words]
    assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b)]


def test_a_trial_that_was_not_run_is_where_its_prediction_is_or_said_at_the_edge(
    record, tmp_path, figures
) -> None:
    over = {"outcome": Outcome.predicted_over}
    runs = [
        record("a", 4.0, 1.0),
        record("near", None, None, predicted_peak_bytes=4 * GIB, **over),
        record("far", None, None, predicted_peak_bytes=20 * GIB, **over),
        record("farther", None, None, predicted_peak_bytes=30 * GIB, **over),
    ]
    plot_trade_off(runs, MAE, 3 * GIB, tmp_path)
    axes = figures[0].axes[0]
    drawn = [
        float(x)
        for points in axes.collections
        if points.get_label() == "predicted over, not run"
        for x, _ in points.get_offsets()
    ]
    assert drawn == [4.0]
    assert "2 predicted over, not run, up to 30.00 GiB →" in [
        text.get_text() for text in axes.texts
    ]
    assert axes.get_xlim()[1] < 20
