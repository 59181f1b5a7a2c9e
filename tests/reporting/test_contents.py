from __future__ import annotations

from expt.reporting.contents import Wanted, contents
from expt.reporting.page import render
from expt.reporting.records import RunSet

GIB = 2**30


def wanted(budget: int | None = None, rows: int = 60) -> Wanted:
    return Wanted("val/mae", budget, [], None, rows, "python -m expt task=report")


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
        "Error against memory",
        "How good the predictions were",
    ]
    assert any("importances: it takes 10 finished runs" in line for line in found.page.missing)
    assert "Error against memory" in render(found.page)


def test_where_nothing_fits_the_smallest_peak_is_told(record, tmp_path) -> None:
    runs = RunSet((record("a", 5.0, 3.0), record("b", None, 2.5, state="out_of_memory")), "here")
    found = contents(runs, wanted(GIB), tmp_path)
    assert found.best is None
    assert found.page.lead == (
        "No run finished inside the budget of 1.00 GiB; the smallest peak seen is 2.50 GiB."
    )


def test_runs_that_all_failed_still_make_a_page(record, tmp_path) -> None:
    runs = RunSet(
        tuple(record(f"r{n}", None, None, state="failed", detail=f"reason {n}") for n in range(20)),
        "here",
    )
    found = contents(runs, wanted(), tmp_path)
    assert found.figures == []
    assert found.page.problems[0] == "20 × failed"  # noqa: RUF001
    assert found.page.problems[1] == "r0: reason 0"
    assert found.page.problems[-1] == "… and 8 more, in runs.csv"
    assert "Error against memory: no run has val/mae." in found.page.missing


def test_a_long_table_is_cut_and_says_so(record, tmp_path) -> None:
    runs = RunSet(
        tuple(record(str(n), 3.0 + n, settings={"model.width": str(n)}) for n in range(9)), "here"
    )
    found = contents(runs, wanted(rows=4), tmp_path)
    assert len(found.page.table.rows) == 4
    assert len(found.table.rows) == 9
    assert found.page.table.columns[-1] == "width", "settings that differ have a column"
    assert found.page.table_words.startswith("The first 4 of 9 runs")
