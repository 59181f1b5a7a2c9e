from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from expt.commands.multirun import Grid
from expt.config.schema import TrackingConfig


def test_the_parents_parameters_hold_no_password(tmp_path, monkeypatch) -> None:
    started: list[dict[str, Any]] = []

    class Told:
        def start(self, name: str, parameters: dict[str, Any], tags: dict[str, str]) -> None:
            started.append(parameters)

    monkeypatch.setattr("expt.commands.multirun.open_tracker", lambda *arguments: Told())
    lines = ["tracking.uri=http://me:geheim@host", "memory=lite,full"]
    config = OmegaConf.create(
        {
            "search": None,
            "tracking": OmegaConf.structured(TrackingConfig),
            "hydra": {"overrides": {"task": lines}, "sweep": {"dir": str(tmp_path)}},
        }
    )
    grid = Grid()
    grid.on_multirun_start(config)
    grid.on_job_start(config)
    assert started == [{"overrides": "tracking.uri=http://me:***@host memory=lite,full"}]


def test_the_table_has_what_varied_and_a_row_for_what_failed(expt, home) -> None:
    line = ("memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false",
            "model=stid", "memory.plan=false", "trainer.epochs=1,0", "optimizer.lr=1e-3,1e-4",
            "hydra.sweep.dir=grid")  # fmt: skip
    code, out, _ = expt("-m", *line, small=False)
    assert code == 2
    text = (home / "grid/comparison.md").read_text()
    heads, _, *rows = [
        [cell.strip() for cell in row.strip("| ").split("|")]
        for row in text.splitlines()
        if row.startswith("|")
    ]
    assert heads[:5] == ["job", "preset", "epochs", "lr", "status"]
    assert [row[:1] + row[2:5] for row in rows] == [
        ["0", "1", "0.001", "completed"],
        ["1", "1", "0.0001", "completed"],
        ["2", "0", "0.001", "failed"],
        ["3", "0", "0.0001", "failed"],
    ]
    assert "2: ConfigError: trainer.epochs must be at least 1, got 0" in text
    assert "2: ConfigError: trainer.epochs must be at least 1" in out
    # The smoke test evaluates a part only, which is marked wherever a figure stands.
    assert rows[0][5].endswith(" *") and "* of a part only: test 16 of 6850 samples" in text


def test_a_part_of_the_test_is_marked_everywhere(expt, home) -> None:
    import json

    from mlflow import MlflowClient

    from expt.result import load_result

    store = f"sqlite:///{home}/mlflow.db"
    line = ("tracking=mlflow", f"tracking.uri={store}", "trainer.epochs=1", "memory.plan=false")
    code, out, err = expt(*line, "model=stid", "hydra.run.dir=run")
    assert code == 0, err
    assert "test MAE *" in out and "* of a part only: test 16 of 6850 samples" in out
    result = load_result(home / "run")
    assert result.partial == {"val": "16 of 3425 samples", "test": "16 of 6850 samples"}
    run = MlflowClient(store).get_run(result.tracking["run_id"])
    assert run.data.tags["partial.test"] == "16 of 6850 samples"
    for source in ("report.runs=run", "report.experiment=expt"):
        code, out, err = expt(
            "task=report", source, f"tracking.uri={store}", "hydra.run.dir=page", small=False
        )
        assert code == 0, err
        page = (home / "page/report.html").read_text()
        assert "Figures with * are of a part of their split only" in page
        assert " *</td>" in page
    assert json.loads((home / "page/report.json").read_text())["not_shown"]
