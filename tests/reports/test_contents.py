from __future__ import annotations

import re

from expt.job import Metric
from expt.reports.contents import Wanted, contents
from expt.reports.page import render
from expt.reports.records import RunSet
from expt.result import Outcome

GIB = 2**30


def wanted(budget: int | None = None, rows: int = 60) -> Wanted:
    return Wanted(budget, [], None, rows, "python -m expt task=report")


def test_the_best_run_leads_and_is_marked(record, tmp_path) -> None:
    runs = RunSet(
        (
            record("large", 3.0, 4.0, metrics={"test/mae": 3.3}),
            record("a", 5.0, 1.0),
            record("b", 4.0, 1.5, metrics={"test/mae": 4.2}),
        ),
        "here",
    )
    found = contents(runs, wanted(2 * GIB), tmp_path)
    assert found.best.name == "b"
    assert found.page.lead == (
        "The best of 3 runs inside the budget of 2.00 GiB is b: validation MAE 4.000 at a peak of "
        "1.50 GiB, 75 % of the budget."
    ).replace("75 %", "75%")
    assert [row[0] for row in found.page.table.rows] == ["b", "a", "large"]
    assert (list(found.page.marked), list(found.page.dimmed)) == ([0], [2])
    assert [one.name for one in found.pareto] == ["a", "b", "large"]
    cards = {card.about: card.value for card in found.page.cards}
    assert cards["best validation MAE"] == "4.000"
    assert cards["its test MAE"] == "4.200"
    assert cards["runs with a result"] == "3 of 3"
    assert [p.title for p in found.page.pictures] == [
        "MAE against memory",
        "How good the predictions were",
    ]
    assert any("importances: it takes 10 finished runs" in line for line in found.page.missing)
    assert "MAE against memory" in render(found.page)


def test_where_nothing_fits_the_smallest_peak_is_told(record, tmp_path) -> None:
    runs = RunSet(
        (record("a", 5.0, 3.0), record("b", None, 2.5, outcome=Outcome.out_of_memory)), "here"
    )
    found = contents(runs, wanted(GIB), tmp_path)
    assert found.best is None
    assert found.page.lead == (
        "No run finished inside the budget of 1.00 GiB; the smallest peak seen is 2.50 GiB."
    )


def test_runs_that_all_failed_still_make_a_page(record, tmp_path) -> None:
    runs = RunSet(
        tuple(
            record(f"r{n}", None, None, outcome=Outcome.failed, detail=f"reason {n}")
            for n in range(20)
        ),
        "here",
    )
    found = contents(runs, wanted(), tmp_path)
    assert found.figures == []
    assert found.page.problems[0] == "20 × failed"  # noqa: RUF001
    assert found.page.problems[1] == "r0: reason 0"
    assert found.page.problems[-1] == "… and 8 more, in runs.csv"
    assert "MAE against memory: no run has val/mae." in found.page.missing


def test_a_long_table_is_cut_and_says_so(record, tmp_path) -> None:
    runs = RunSet(
        tuple(record(str(n), 3.0 + n, settings={"model.width": str(n)}) for n in range(9)), "here"
    )
    found = contents(runs, wanted(rows=4), tmp_path)
    assert len(found.page.table.rows) == 4
    assert len(found.table.rows) == 9
    assert found.page.table.columns[-1] == "width", "settings that differ have a column"
    assert found.page.table_words.startswith("The first 4 of 9 runs")


def test_runs_on_several_data_are_not_ranked_against_each_other(record, tmp_path) -> None:
    def on(path: str, name: str, error: float, peak: float, **more):
        settings = {"data._target_": "Speeds", "data.path": path, "model.width": name}
        return record(name, error, peak, settings=settings, **more)

    runs = RunSet(
        (
            on("own.npz", "ref", 0.8, 0.5),
            *(on("la.npz", f"r{n}", 5.0 - n / 10, 1.0 + n / 10) for n in range(12)),
            on("own.npz", "ref2", 0.9, 0.4),
        ),
        "here",
    )
    found = contents(runs, wanted(), tmp_path)
    assert found.best.name == "r11"
    assert {one.name for one in found.pareto} == {f"r{n}" for n in range(12)}
    assert "on 2 different data" in found.page.lead
    assert list(found.page.by_data) == [
        "la (12 runs): r11, validation MAE 3.900, peak 2.10 GiB",
        "own (2 runs): ref, validation MAE 0.800, peak 512.0 MiB",
    ]
    assert [row[:2] for row in found.page.table.rows][11:13] == [("r0", "la"), ("ref", "own")]
    assert list(found.page.marked) == [0, 12], "the best on each"
    words = {picture.title: picture.words for picture in found.page.pictures}
    for title in ("MAE against memory", "Run after run", "What mattered"):
        if title in words:
            assert words[title].endswith("Only runs on la, 12 of 14.")
    assert "MAE against memory" in words and "Run after run" in words
    assert found.importance.runs == 12
    page = render(found.page)
    assert "<li>own (2 runs): ref" in page
    assert "best validation MAE on la" in page


def test_runs_of_another_job_are_said_to_have_another_metric(record, tmp_path) -> None:
    def on(path: str, value: float | None, **more):
        settings = {"data._target_": "Data", "data.path": path}
        return record(path, value, settings=settings, **more)

    runs = (on("la", 3.0), on("clips", None, monitor="accuracy"))
    found = contents(RunSet(runs, "here"), wanted(), tmp_path)
    other = "none has val/mae; they monitored val/accuracy"
    assert found.page.by_data[1] == f"clips (1 run): {other}"
    runs = (on("la", 3.0), on("own", None, outcome=Outcome.failed))
    found = contents(RunSet(runs, "here"), wanted(), tmp_path)
    assert found.page.by_data[1] == "own (1 run): none finished"
    alone = contents(RunSet((on("clips", None, monitor="accuracy"),), "here"), wanted(), tmp_path)
    assert alone.page.lead.startswith("No run has val/mae; ")


def test_runs_on_the_same_data_are_shown_as_if_there_were_no_other(record, tmp_path) -> None:
    settings = {"data._target_": "Speeds", "data.path": "la.npz"}
    runs = RunSet(tuple(record(str(n), 3.0 + n, settings=settings) for n in range(3)), "here")
    found = contents(runs, wanted(), tmp_path)
    assert found.page.lead.startswith("The best of 3 runs is 0: ")
    assert found.page.by_data == []
    assert "data" not in found.page.table.columns
    assert all("Only runs" not in picture.words for picture in found.page.pictures)
    assert " on la" not in render(found.page)


def test_of_many_data_the_first_are_told(record, tmp_path) -> None:
    runs = RunSet(
        tuple(
            record(str(n), 3.0, settings={"data._target_": "S", "data.path": f"{n}.npz"})
            for n in range(10)
        ),
        "here",
    )
    lines = contents(runs, wanted(), tmp_path).page.by_data
    assert len(lines) == 9
    assert lines[-1] == "… and 2 more data, in report.json"


def test_where_higher_is_better_the_highest_leads(record, tmp_path) -> None:
    metric = Metric("val/accuracy", goal="max", label="accuracy", percent=True)
    runs = RunSet(
        (
            record("a", 0.312, 1.0),
            record("b", 0.875, 1.5, metrics={"test/accuracy": 0.81}),
            record("large", 0.9, 4.0),
        ),
        "here",
        metric,
    )
    found = contents(runs, wanted(2 * GIB), tmp_path)
    assert found.page.lead.startswith(
        "The best of 3 runs inside the budget of 2.00 GiB is b: validation accuracy 87.5 % at"
    )
    assert [row[0] for row in found.page.table.rows] == ["b", "a", "large"]
    assert found.page.table.columns[2] == "val accuracy"
    cards = {card.about: card.value for card in found.page.cards}
    assert (cards["best validation accuracy"], cards["its test accuracy"]) == ("87.5 %", "81.0 %")
    assert found.page.pictures[0].title == "Accuracy against memory"
    assert "the best validation accuracy inside the budget first" in found.page.table_words
    assert "MAE" not in re.sub('base64,[^"]*', "", render(found.page))


def test_the_best_of_counts_what_has_a_result(record, tmp_path) -> None:
    runs = [record("a", 4.0), record("b", 5.0), record("c", None, outcome=Outcome.failed)]
    found = contents(RunSet(tuple(runs), "here"), Wanted(None, [], None, 10), tmp_path)
    assert found.page.lead.startswith("The best of 2 runs with a result is a")
