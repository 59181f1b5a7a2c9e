from __future__ import annotations

from expt.job import Metric
from expt.reports.records import (
    RunRecord,
    RunSet,
    flattened,
    labels,
    ranked_by,
    short_names,
    varied,
)
from expt.result import Outcome

GIB = 2**30


def test_what_fits(record) -> None:
    run = record("a", 4.0, 2.0)
    assert run.fits(None) and run.fits(2 * GIB)
    assert not run.fits(2 * GIB - 1)
    assert not record("a", None).fits(None)
    over = record("a", 4.0, 2.0, outcome=Outcome.over_budget, budget_bytes=GIB)
    assert not over.fits(None) and not over.fits(GIB), "as its search found"
    assert over.fits(2 * GIB) and not over.fits(2 * GIB - 1), "another budget, judged anew"
    assert not record("a", 4.0, None, outcome=Outcome.over_budget, budget_bytes=1).fits(9 * GIB)
    assert not record("a", 4.0, outcome=Outcome.pruned).fits(9 * GIB)
    assert record("a", 4.0, None).fits(1), "what was not measured is not held against it"
    assert not record("a", 4.0, 1.0, peak_reserved_bytes=3 * GIB).fits(2 * GIB)


def test_the_budget_is_the_one_that_all_had(record) -> None:
    def of(*budgets: int | None, without_error: int | None = 5) -> int | None:
        runs = [record("a", 1.0, budget_bytes=b) for b in budgets]
        runs.append(record("b", None, outcome=Outcome.failed, budget_bytes=without_error))
        return RunSet(tuple(runs), "").budget_bytes

    assert of(5, 5) == 5
    assert of(5, 5, without_error=None) == 5
    assert of(5, None) is None, "a run's own budget is not for those that had none"
    assert of(5, 6) is None
    assert of(None) is None
    assert of() == 5, "nothing finished inside it"
    assert RunSet((), "").budget_bytes is None


def test_settings_that_differ_are_those_of_the_training(record) -> None:
    def run(**settings: str) -> RunRecord:
        return record(
            "a", 1.0, settings={name.replace("__", "."): v for name, v in settings.items()}
        )

    records = [
        run(model__embed_dim="64", trainer__seed="0", tracking__uri="x", trainer__resume="False"),
        run(model__embed_dim="96", trainer__seed="0", tracking__uri="y", trainer__resume="True"),
        record("nothing known", 1.0),
    ]
    assert varied(records) == ["model.embed_dim"]


def test_a_setting_that_some_runs_were_not_given_differs(record) -> None:
    def run(model: str, **more: str) -> RunRecord:
        settings = {"model._target_": model, "data._target_": "D", "data.path": "a.npz"}
        return record("a", 1.0, settings=settings | more)

    wide = {"model.width": "64"}
    assert varied([run("A"), run("A", **wide)]) == ["model.width"]
    assert varied([run("A", **wide), run("B")]) == ["model._target_"], "B has no width"
    never_started = record("b", None, settings={"model._target_": "A"})
    assert varied([run("A", **wide), never_started]) == []


def test_a_metric_is_described_by_the_runs_that_have_its_figure(record) -> None:
    def run(unit: str, **more) -> RunRecord:
        return record("a", None, described={"mae": Metric("mae", unit=unit)}, **more)

    done = run("mph", metrics={"val/mae": 3.0})
    failed = [run("km/h", outcome=Outcome.failed)] * 3
    assert ranked_by(RunSet((done, *failed), ""), None).metric.unit == "mph"
    assert ranked_by(RunSet(tuple(failed), ""), None).metric.unit == "km/h"


def test_flattened_is_what_a_tracker_has() -> None:
    nested = {"model": {"sizes": [1, 2], "empty": {}, "on": False}, "seed": None}
    assert flattened(nested) == {
        "model.sizes": "[1, 2]",
        "model.empty": "{}",
        "model.on": "False",
        "seed": "None",
    }


def test_short_names_stay_different() -> None:
    names = ["model.dropout", "model.sensor_dropout", "a.lr", "b.lr"]
    assert list(short_names(names).values()) == ["dropout", "sensor_dropout", "a.lr", "b.lr"]


def test_runs_are_called_by_what_tells_them_apart(record) -> None:
    def of(*runs: tuple[str, str | None]) -> list[str]:
        return labels([record(name, 1.0, preset=preset) for name, preset in runs])

    assert of(("0", "full"), ("1", "lite")) == ["full", "lite"]
    assert of(("x/0", "lite"), ("x/1", "lite")) == ["0", "1"]
    assert of(("x/0", "lite"), ("y/0", None)) == ["x/0", "y/0"]


def test_the_model_is_named_without_its_module(record) -> None:
    assert record("a", 1.0, settings={"model._target_": "my_lab.MyNet"}).model == "MyNet"
    assert record("a", 1.0).model == ""
