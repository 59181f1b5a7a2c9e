from __future__ import annotations

import random
from dataclasses import replace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from expt.job import Metric
from expt.reports.figures.importance import importance, plot_importance
from expt.reports.records import RunSet


def runs_of(record, count: int, **settings) -> RunSet:
    """Runs whose error is decided by `optimizer.lr`, and hardly by `model.dropout`."""
    chance = random.Random(0)
    records = []
    for number in range(count):
        lr, dropout = chance.uniform(1e-3, 1e-2), chance.uniform(0, 0.3)
        kind = chance.choice(["a", "b"])
        values = {"optimizer.lr": lr, "model.dropout": dropout, "model.kind": kind} | settings
        error = 3 + abs(values["optimizer.lr"] - 4e-3) * 300 + 0.001 * dropout
        texts = {name: str(value) for name, value in values.items()}
        records.append(record(str(number), error, settings=texts, trial=number))
    return RunSet(tuple(records), "here")


def test_what_decides_the_error_comes_first(record) -> None:
    found = importance(runs_of(record, 60))
    assert next(iter(found.shares)) == "optimizer.lr"
    assert found.shares["optimizer.lr"] > 0.6
    assert sum(found.shares.values()) == pytest.approx(1)
    assert set(found.shares) == {"optimizer.lr", "model.dropout", "model.kind"}
    assert (found.runs, found.reason) == (60, "")


def test_a_study_brings_its_own_space(record) -> None:
    runs = runs_of(record, 60)
    space = {
        "optimizer.lr": FloatDistribution(1e-3, 1e-2, log=True),
        "model.kind": CategoricalDistribution(["a", "b"]),
    }
    parameters = {
        r.trial: {
            "optimizer.lr": float(r.settings["optimizer.lr"]),
            "model.kind": r.settings["model.kind"],
        }
        for r in runs.records
    }
    found = importance(RunSet(runs.records, "here", space=space, parameters=parameters))
    assert set(found.shares) == {"optimizer.lr", "model.kind"}
    assert found.shares["optimizer.lr"] > 0.6


@pytest.mark.parametrize(
    ("count", "fixed", "reason"),
    [
        (9, {}, "it takes 10 finished runs; 9 are"),
        (12, {"model.dropout": 0.1, "model.kind": "a"}, "only optimizer.lr differs"),
        (
            12,
            {"model.dropout": 0.1, "model.kind": "a", "optimizer.lr": 4e-3},
            "no setting differs",
        ),
    ],
)
def test_why_there_is_none(record, tmp_path, count, fixed, reason) -> None:
    found = importance(runs_of(record, count, **fixed))
    assert found.shares == {}
    assert reason in found.reason
    assert plot_importance(found, tmp_path) == []


def test_equal_errors_say_nothing_about_settings(record) -> None:
    runs = runs_of(record, 20)
    equal = tuple(replace(run, value=3.0) for run in runs.records)
    found = importance(RunSet(equal, "here"))
    assert found.shares == {}
    assert found.reason == "the best runs are no different from the others"


def test_it_is_drawn(record, tmp_path) -> None:
    assert len(plot_importance(importance(runs_of(record, 40)), tmp_path)) == 2


def test_the_best_tenth_are_the_highest_where_higher_is_better(record) -> None:
    """`optimizer.lr` decides who is lowest, `model.dropout` alone who is highest."""
    chance = random.Random(1)
    records = []
    for number in range(80):
        lr, dropout = chance.uniform(0, 1), chance.uniform(0, 1)
        value = 1 + dropout if dropout > 0.8 else -lr * (lr > 0.5)
        texts = {"optimizer.lr": str(lr), "model.dropout": str(dropout)}
        records.append(record(str(number), value, settings=texts))
    for goal, first in (("max", "model.dropout"), ("min", "optimizer.lr")):
        metric = Metric("val/gain", goal=goal)
        assert next(iter(importance(RunSet(tuple(records), "", metric)).shares)) == first
