"""From a notebook: what comes back, what is raised, and that nothing global is left changed."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import expt as package
from expt.config.compose import conf_dir
from expt.errors import ConfigError
from expt.result import load_result

NOTEBOOK = Path(__file__).parents[2] / "docs/first-steps.ipynb"
SMALL = ["memory=minimal", "debug=smoke", "tracking=none", "trainer.progress=false"]
TINY = [*SMALL, "trainer.epochs=1", "trainer.eval_batches=1", "memory.plan=false", "model=stid"]


FEWER = ("trainer.steps_per_epoch=40", "trainer.steps_per_epoch=8")
"""Its cells run as they stand but for that: three trainings of 80 steps are most of its time."""


def test_the_notebook_trains_predicts_and_plots(home) -> None:
    space: dict[str, object] = {}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace(*FEWER)
            exec(compile(source, f"cell {cell['id']}", "exec"), space)
    result = space["result"]
    assert result.steps == 16
    assert result.status == "completed" and result.epochs == 2
    assert load_result(result.run_dir) == result
    assert tuple(space["forecast"].shape) == (288, 12, 29)
    data, day, forecast = space["data"], space["day"], space["forecast"]
    observed = day.target > 0
    error = (forecast - day.target).abs()[observed].mean()
    assert 0 < float(error) < 15
    space["figure"].savefig(home / "day.png")
    assert (home / "day.png").stat().st_size > 10_000
    assert [one.metrics["val/mae"] > 0 for one in space["results"]] == [True, True]
    assert data.unit == "mph"


def test_hydra_and_the_process_are_as_they_were(home, monkeypatch) -> None:
    own = [logging.NullHandler()]
    monkeypatch.setattr(logging.getLogger(), "handlers", list(own))
    before = (list(sys.path), list(sys.argv), dict(os.environ), os.getcwd())
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir())):
        ours = GlobalHydra.instance().hydra
        result = package.train([*TINY, "hydra.run.dir=run"])
        assert GlobalHydra.instance().hydra is ours
    assert result.run_dir == home / "run"
    assert (list(sys.path), list(sys.argv), dict(os.environ), os.getcwd()) == before
    assert logging.getLogger().handlers == own
    # A refused call restores as well, and a second training in the same process works.
    with pytest.raises(ConfigError, match=r"trainer\.epochs must be at least 1"):
        package.train([*TINY, "trainer.epochs=0"][1:])
    assert logging.getLogger().handlers == own
    assert not GlobalHydra.instance().is_initialized()
    assert package.train([*TINY, "hydra.run.dir=second"]).status == "completed"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: package.train(["trainer.epoch=1"]), "epoch"),
        (lambda: package.train(["-m"]), "which command runs is said by the function"),
        (lambda: package.train(["task=plan"]), "task=plan: which command runs"),
        (lambda: package.train("trainer.epochs=1"), "settings are a list"),
        (lambda: package.sweep(["trainer.epochs=1"]), "search=NAME"),
        (lambda: package.train(["data.path=nowhere.npz", "tracking=none"]), "no such file"),
    ],
)
def test_a_mistake_is_raised_in_words(home, call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    assert not list(home.glob("outputs/runs/*/*"))


def test_a_grid_has_a_result_for_every_job_also_for_one_that_was_refused(home) -> None:
    found = package.grid([*TINY, "trainer.epochs=1,0", "hydra.sweep.dir=grid"])
    assert [one.status for one in found] == ["completed", "failed"]
    assert "trainer.epochs must be at least 1" in found[1].stop_reason
    assert found[0].run_dir == home / "grid/0"


def test_a_plan_has_its_peak(home) -> None:
    planned = package.plan_run([*TINY[:4], "hydra.run.dir=plan"])
    assert planned.peak_bytes == planned.record["peak_bytes"] > 1e6


def test_a_sweep_returns_its_summary(home) -> None:
    summary = package.sweep(
        [*TINY[1:], "search=debug", "search.n_trials=2", "search.test_winner=false",
         "search.space={optimizer.lr:'choice(1e-3,1e-4)'}", "search.presets=[]"]
    )  # fmt: skip
    assert summary.finished == 2 and summary.best is not None
    assert (summary.run_dir / "sweep.json").exists()
    model, transforms = package.load(summary.best["run_dir"])
    assert transforms["unit"] == "mph" and not model.training


def test_what_is_offered_is_imported_late_and_no_package_of_ours(home) -> None:
    import pkgutil

    names = {"load", "train", "grid", "sweep", "plan_run"}
    assert names <= set(dir(package))
    assert not names & {module.name for module in pkgutil.iter_modules(package.__path__)}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        package.trian  # noqa: B018
