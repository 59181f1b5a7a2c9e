from __future__ import annotations

from expt.reports.figures.excluded import _peak, excluded, plot_excluded
from expt.result import Outcome

GIB = 2**30


def test_every_suggestion_is_in_one_row_or_is_counted(record, tmp_path) -> None:
    over = {"outcome": Outcome.predicted_over, "predicted_peak_bytes": 4 * GIB}
    runs = [
        record("a", 5.0, 1.0),
        record("b", 4.0, 3.0),  # trained to its end, above the budget
        record("c", None, None, outcome=Outcome.out_of_memory, predicted_peak_bytes=GIB),
        record("d", None, None, **over),
        record("e", None, None, **over),
        record("f", None, None, outcome=Outcome.failed),
        record("g", None, None, outcome=Outcome.predicted_over),  # no peak is known of it
    ]
    found = excluded(runs, 2 * GIB)
    assert {label: [r.name for r in own] for label, own in found.rows.items()} == {
        "trained inside": ["a"],
        "trained, over": ["b"],
        "out of memory": ["c"],
        "not started: predicted over": ["d", "e"],
    }
    assert "peak that is not known: 1 failed, 1 predicted over. Of 4 runs" in found.words()
    assert "Of 4 runs that were started, 2 did not fit." in found.words()
    assert len(plot_excluded(found, tmp_path)) == 2


def test_a_run_without_the_ranked_figure_is_judged_by_its_memory(record) -> None:
    """A search tests the winner alone, and may be ranked by a figure of the test."""
    runs = [record("a", None, 1.0), record("b", None, 3.0), record("c", 4.0, 1.0)]
    found = excluded(runs, 2 * GIB)
    assert {label: len(own) for label, own in found.rows.items()} == {
        "trained inside": 2,
        "trained, over": 1,
    }


def test_a_prediction_is_drawn_where_it_was_compared_with_the_budget(record) -> None:
    """On CUDA an allocator reserves more than the peak of tensors."""
    over = {"outcome": Outcome.predicted_over, "predicted_peak_bytes": GIB}
    one = record("a", None, None, predicted_demand_bytes=3 * GIB, **over)
    assert _peak(one) == 3 * GIB


def test_without_a_budget_or_an_excluded_run_there_is_nothing_to_say(record, tmp_path) -> None:
    assert excluded([record("a", 5.0)], None) is None
    assert excluded([record("a", 5.0)], 2 * GIB) is None
    assert plot_excluded(None, tmp_path) == []
