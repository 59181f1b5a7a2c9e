from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from expt.job import Metric
from expt.reports.figures.claims import Claim
from expt.reports.records import RunRecord
from expt.reports.run_table import (
    as_csv,
    as_markdown,
    console_table,
    ordered,
    print_runs,
    run_table,
)
from expt.result import Outcome

MAE = Metric("val/mae", label="MAE")
GIB = 2**30


def test_the_order_is_what_fits_by_error_then_what_does_not(record) -> None:
    runs = [
        record("failed", None, None, outcome=Outcome.failed),
        record("large", 2.0, 4.0),
        record("b", 4.0),
        record("a", 3.0),
    ]
    assert [r.name for r in ordered(runs, MAE, 2 * GIB)] == ["a", "b", "large", "failed"]


def test_columns_hold_what_is_known_and_no_column_is_empty(record) -> None:
    settings = {"model.embed_dim": "64"}
    runs = [
        record("a", 3.0, preset="lite", settings=settings, metrics={"test/mae": 3.4}),
        record("b", None, None, outcome=Outcome.out_of_memory, settings={"model.embed_dim": "96"}),
    ]
    cells = run_table(runs, MAE, [Claim("lite", "6 GB", "< 4.0", settings)], [*settings])
    assert cells.columns == (
        "run", "preset", "state", "val MAE", "claimed", "test MAE", "peak claimed",
        "predicted", "measured", "off by", "time", "embed_dim",
    )  # fmt: skip
    assert cells.rows[0] == (
        "a", "lite", "completed", "3.000", "< 4.0", "3.400", "6 GB", "1.00 GiB", "1.00 GiB",
        "+0.10 %", "1:00 min", "64",
    )  # fmt: skip
    assert cells.rows[1][2:5] == ("out of memory", "–", "–")  # noqa: RUF001
    without = run_table([record("a", 3.0)], MAE, [])
    assert "claimed" not in without.columns and "preset" not in without.columns


def test_a_sampled_number_is_shown_with_the_digits_that_count(record) -> None:
    texts = ["0.0060350992997", "0.001", "[1, 2, 4, 8, 16]", "1e-05", "123456789"]
    runs = [record(text, 1.0, settings={"optimizer.lr": text}) for text in texts]
    cells = run_table(runs, MAE, [], ["optimizer.lr"])
    assert [row[-1] for row in cells.rows] == [
        "0.006035", "0.001", "[1, 2, 4, 8, 16]", "1e-05", "1.235e+08",
    ]  # fmt: skip


def test_markdown_and_console_have_the_same_cells(record, capsys) -> None:
    cells = run_table([record("a|b", 3.0)], MAE, [])
    lines = as_markdown(cells).splitlines()
    assert lines[0].startswith("| run | state | val MAE |")
    assert lines[1].startswith("|---|---|---:|")
    assert "a\\|b" in lines[2]
    Console(width=120).print(console_table(cells, 120))
    assert "1.00 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_on_the_console(record, capsys, width) -> None:
    settings = {
        "model._target_": "expt.jobs.traffic.alternating.Alternating",
        "optimizer.lr": "0.001",
    }
    runs = [
        record("2026-11-21/17-43-07-b88466-a-long-name", 11.722, preset="minimal",
               settings=settings, metrics={"test/mae": 5.097}),
        record("b", None, outcome=Outcome.out_of_memory, settings=settings),
    ]  # fmt: skip
    claims = [Claim("minimal", "3 GB", "4.5", {})]
    data = {id(runs[0]): "metr_la_29 eval_batches=2", id(runs[1]): "ten TrafficData horizon=12"}
    cells = run_table(runs, MAE, claims, [*settings], data)
    table = console_table(cells, width)
    Console(width=width).print(table)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    for word in ("run", "data", "val", "MAE", "measured", "11.722", "5.097", "1.00 GiB"):
        assert word in out
    assert ("out of memory" in out) is (width == 120), "what there is no room for is left out"
    assert len(table.columns) >= (5 if width == 80 else 7)


def test_a_class_is_shown_by_its_name(record) -> None:
    runs = [record(n, 1.0, settings={"model._target_": f"expt.jobs.m.{n}"}) for n in "AB"]
    cells = run_table(runs, MAE, [], ["model._target_"])
    assert cells.columns[-1] == "model"
    assert [row[-1] for row in cells.rows] == ["A", "B"]


def test_under_the_table_it_says_what_claims_are_about(record, capsys) -> None:
    runs = [record("a", 3.0, preset="lite", metrics={"test/mae": 3.4})]
    print_runs(run_table(runs, MAE, [Claim("lite", "6 GB", "< 4.0", {})]))
    assert "Claims are those of their source" in capsys.readouterr().out
    print_runs(run_table(runs, MAE, []))
    assert "claim" not in capsys.readouterr().out.lower()


def test_brackets_in_a_setting_are_text(record, capsys) -> None:
    print_runs(run_table([record("clips/[a-z]", 3.0), record("b[/c]", 3.0)], MAE, []))
    out = capsys.readouterr().out
    assert "clips/[a-z]" in out and "b[/c]" in out


def test_csv_has_figures_in_full_and_every_setting_that_differs(record) -> None:
    settings = [{f"model.p{n}": str(value) for n in range(9)} for value in (1, 2)]
    runs = [
        record("a", 3.14159, settings=settings[0], metrics={"test/mae": 3.4}),
        record("b", None, settings=settings[1], outcome=Outcome.failed, detail='said "no", twice'),
    ]
    rows = list(csv.DictReader(io.StringIO(as_csv(runs, MAE))))
    assert rows[0]["val/mae"] == "3.14159"
    assert rows[0]["peak_allocated_bytes"] == str(GIB)
    assert rows[1]["detail"] == 'said "no", twice'
    assert [rows[1][f"model.p{n}"] for n in range(9)] == ["2"] * 9
    assert rows[0]["test/mae"] == "3.4"


def test_what_has_a_column_in_the_csv_is_there_once(record) -> None:
    stored = {"seconds": 60.0, "memory/peak_allocated_bytes": 1e9, "memory/oom_events": 2.0}
    head = as_csv([record("a", 3.0, metrics=stored)], MAE).splitlines()[0].split(",")
    assert head.count("seconds") == 1
    assert [name for name in head if name.startswith("memory/")] == ["memory/oom_events"]


def test_classes_of_data_stand_in_its_own_column_only(record) -> None:
    settings = [{"data._target_": name, "model._target_": name} for name in ("a.One", "b.Two")]
    records = [record(str(n), 3.0, settings=one) for n, one in enumerate(settings)]
    data = {id(one): f"set{n}" for n, one in enumerate(records)}
    cells = run_table(records, MAE, (), ("data._target_", "model._target_"), data)
    assert cells.columns.count("data") == 1
    assert "model" in cells.columns
    assert "data" in run_table(records, MAE, (), ("data._target_",)).columns


def test_cells_of_the_csv_are_no_formulas() -> None:
    record = RunRecord("=cmd()", Outcome.completed, settings={"model.a": "@x"}, run_dir="-r")
    other = RunRecord("b", Outcome.failed, settings={"model.a": "-1"}, detail="+oops")
    rows = list(csv.DictReader(as_csv([record, other], Metric("val/mae")).splitlines()))
    assert (rows[0]["name"], rows[0]["model.a"], rows[0]["run_dir"]) == ("'=cmd()", "'@x", "'-r")
    assert (rows[1]["model.a"], rows[1]["detail"]) == ("-1", "'+oops")
