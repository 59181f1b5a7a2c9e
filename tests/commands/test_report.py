"""`task=report` from its command line: the page, the files, MLflow, and every mistake."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expt.training.evaluate import evaluate

REPORT = ("task=report", "hydra.run.dir=page")


@pytest.fixture
def grid(expt, home, monkeypatch):
    """Two tiny real runs, tracked in MLflow, whose second epoch is worse than the first."""
    validations = itertools.count()

    def worse_every_second_time(*arguments: Any) -> Any:
        metrics, more = evaluate(*arguments), 10.0 * (next(validations) % 2)
        figures = {name: value + more for name, value in metrics.compute().items()}
        return SimpleNamespace(compute=lambda: figures)

    monkeypatch.setattr("expt.training.trainer.evaluate", worse_every_second_time)
    code, _, err = expt(
        "-m", "memory=lite,minimal", "model=stid", "debug=smoke", "trainer.progress=false",
        "trainer.epochs=2", "hydra.sweep.dir=sweep", "tracking=mlflow",
        f"tracking.uri=sqlite:///{home}/mlflow.db", f"tracking.artifacts={home}/artifacts",
        small=False,
    )  # fmt: skip
    assert code == 0, err
    return home


def test_a_grid_of_real_runs(expt, grid, drawn) -> None:
    tracking = (f"tracking.uri=sqlite:///{grid}/mlflow.db", f"tracking.artifacts={grid}/artifacts")
    code, out, err = expt(*REPORT, "report.runs=sweep", *tracking, small=False)
    assert code == 0, err
    record = json.loads((grid / "page/report.json").read_text())
    rows = list(csv.DictReader((grid / "page/runs.csv").read_text().splitlines()))
    results = [json.loads((grid / f"sweep/{n}/result.json").read_text()) for n in (0, 1)]
    assert record["runs"] == len(rows) == 2
    best = min(results, key=lambda result: result["metrics"]["val/mae"])
    assert record["best"]["value"] == best["metrics"]["val/mae"]
    for number, result in enumerate(results):
        history = json.loads((grid / f"sweep/{number}/history.json").read_text())
        first, last = (epoch["val"] for epoch in history)
        assert result["metrics"]["val/mae"] == first < last - 5, "the last is not the best"
    assert record["best"]["demand_bytes"] == best["memory"]["peak_allocated_bytes"]
    assert {row["preset"] for row in rows} == {"lite", "minimal"}
    page = (grid / "page/report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"https?://", page)
    assert (grid / "page/plots/trade_off.pdf").exists()
    assert "report: " in out and "not shown: Parameter importances" in out

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{grid}/mlflow.db")
    experiment = client.get_experiment_by_name("expt").experiment_id
    (run,) = client.search_runs([experiment], "tags.kind = 'report'")
    assert run.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {
        "report.html",
        "runs.csv",
        "plots",
    }

    # The same runs by the id of their parent, and by a filter.
    (parent,) = client.search_runs([experiment], "tags.kind = 'grid'")
    for number, source in enumerate(
        (
            (f"report.runs={parent.info.run_id}",),
            ("report.experiment=expt", "report.filter=\"tags.preset = 'lite'\""),
        )
    ):
        code, _, err = expt(
            "task=report", f"hydra.run.dir=again{number}", *source, *tracking, small=False
        )
        assert code == 0, err
        again = json.loads((grid / f"again{number}/report.json").read_text())
        assert again["runs"] == 2 - number
        if not number:
            assert again["best"]["value"] == pytest.approx(record["best"]["value"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report.runs=nowhere",), "report.runs=nowhere: this folder is not there"),
        (("report.runs='no*'",), "this glob matches no folder"),
        (("report.runs=[]",), "report.runs is empty"),
        (("report.runs=empty",), "there is no run in empty"),
        ((), "report.runs=outputs: this folder is not there"),
        (("report.runs=" + "ab" * 16,), "tracking.uri names no store"),
        (("report.runs=[empty," + "ab" * 16 + "]",), "give one kind"),
        (("report.runs=empty", "report.experiment=x"), "two sources"),
        (("report.filter=x",), "report.experiment=NAME"),
        (("report.rows=0",), "report.rows must be at least 1"),
        (("report.budget=lots",), "report.budget=lots is not an amount of memory"),
        (
            ("report.experiment=x", "tracking=mlflow", "tracking.uri=http://127.0.0.1:9"),
            "http://127.0.0.1:9 does not answer",
        ),
        (
            ("report.experiment=x", "tracking=mlflow", "tracking.uri=sqlite:///no.db"),
            "there is no tracking store",
        ),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(expt, home, arguments, words) -> None:
    (home / "empty").mkdir()
    code, _, err = expt(*REPORT, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (home / "page").exists()


def test_a_metric_that_no_run_has(expt, home) -> None:
    run = home / "runs/a"
    run.mkdir(parents=True)
    (run / "launch.json").write_text("{}")
    result = {"status": "completed", "stop_reason": "epochs", "metrics": {"val/mae": 3.0}}
    (run / "result.json").write_text(json.dumps(result))
    code, _, err = expt(*REPORT, "report.runs=runs", "report.metric=val/mea")
    assert code == 2
    assert "report.metric=val/mea: no run has it; did you mean 'val/mae'" in err
    assert expt(*REPORT, "report.runs=runs", "report.budget=2GiB", "report.title=Mine")[0] == 0
    assert "<h1>Mine</h1>" in (home / "page/report.html").read_text()


def test_a_password_is_written_nowhere(expt, home) -> None:
    run = home / "runs/a"
    run.mkdir(parents=True)
    (run / "launch.json").write_text("{}")
    result = {"status": "completed", "stop_reason": "epochs", "metrics": {"val/mae": 3.0}}
    (run / "result.json").write_text(json.dumps(result))
    uri = "http://me:geheim@127.0.0.1:9"
    code, out, err = expt(*REPORT, "report.runs=runs", "tracking=mlflow", f"tracking.uri={uri}")
    assert code == 0, err
    assert "http://me:***@127.0.0.1:9" in (home / "page/report.html").read_text()
    assert "geheim" not in out + err
    assert files_with(home, "geheim") == set()


def files_with(folder: Path, word: str) -> set[str]:
    """Return the files that hold a word and are not for the next process."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and word.encode() in path.read_bytes()
        if path.name != "launch.json" and ".hydra" not in path.parts
    }


def test_the_command_names_ones_own_yaml_files(expt, home) -> None:
    (home / "conf/model").mkdir(parents=True)
    (home / "conf/model/mine.yaml").write_text("_target_: expt.jobs.traffic.stid.STID\n")
    run = home / "runs/a"
    run.mkdir(parents=True)
    (run / "launch.json").write_text("{}")
    result = {"status": "completed", "stop_reason": "epochs", "metrics": {"val/mae": 3.0}}
    (run / "result.json").write_text(json.dumps(result))
    code, _, err = expt(f"--config-dir={home}/conf", *REPORT, "model=mine", "report.runs=runs")
    assert code == 0, err
    assert f"python -m expt --config-dir={home}/conf " in (home / "page/report.html").read_text()
