from __future__ import annotations

import pytest

from expt.job import Metric
from expt.reports.records import RunSet, metric_header, metric_text, metric_words, ranked_by

MAE, MPH = Metric("mae", label="MAE"), Metric("mae", label="MAE", unit="mph")
ACCURACY = Metric("accuracy", goal="max", label="accuracy", percent=True)


@pytest.mark.parametrize(
    ("name", "described", "words", "header"),
    [
        ("val/mae", MAE, "validation MAE", "val MAE"),
        ("test/mae_15min", Metric("mae_15min", label="MAE, 15 min"), "test MAE, 15 min", None),
        ("seconds", None, "seconds", "seconds"),
        ("val/accuracy", ACCURACY, "validation accuracy", "val accuracy"),
        ("val/f1", None, "validation F1", "val F1"),
    ],
)
def test_a_metric_in_words(record, name, described, words, header) -> None:
    known = {} if described is None else {described.name: described}
    metric = ranked_by(RunSet((record("a", None, described=known),), ""), name).metric
    assert metric_words(metric) == words
    assert header is None or metric_header(metric) == header


def test_a_figure_in_a_table() -> None:
    assert metric_text(MPH, 3.04159) == "3.042"
    assert metric_text(ACCURACY, 0.8754) == "87.5 %"
    assert metric_text(MPH, None) == ""


def test_runs_are_ranked_by_what_most_of_them_monitored(record) -> None:
    def run(monitor, **metrics):
        known = {f"val/{name}": value for name, value in metrics.items()}
        about = {"accuracy": ACCURACY, "mae": MPH}
        return record(monitor, None, metrics=known, described=about, monitor=monitor)

    runs = RunSet((run("mae", mae=3.0), run("accuracy", accuracy=0.5), run("accuracy")), "")
    assert ranked_by(runs, None).metric.name == "val/mae", "the first of equals"
    more = RunSet((*runs.records, run("accuracy", accuracy=0.75)), "")
    found = ranked_by(more, None)
    assert (found.metric.name, found.metric.goal) == ("val/accuracy", "max")
    assert [one.value for one in found.records] == [None, 0.5, None, 0.75]
    (note,) = found.notes
    assert note.startswith("Some runs monitored val/mae; all are ranked by val/accuracy.")
    chosen = ranked_by(more, "val/mae")
    assert (chosen.metric.unit, chosen.notes) == ("mph", ())
