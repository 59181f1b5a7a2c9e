"""What earlier versions called a class or a module still works, or is said in a line."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from expt.config import moved
from expt.config.moved import MODULES, current, hint, with_current_targets
from expt.result import load_result


def test_every_new_name_exists() -> None:
    for module in MODULES.values():
        importlib.import_module(module)


def test_targets_are_mapped_wherever_they_are(monkeypatch, capsys) -> None:
    monkeypatch.setattr(moved, "_told", set())
    node = {
        "_target_": "expt.models.stid.STID",
        "parts": [{"_target_": "expt.data.traffic.TrafficData"}, {"_target_": "my_lab.Net"}],
    }
    for _ in range(2):
        assert with_current_targets(node) == {
            "_target_": "expt.jobs.traffic.stid.STID",
            "parts": [
                {"_target_": "expt.jobs.traffic.data.TrafficData"},
                {"_target_": "my_lab.Net"},
            ],
        }
    out = capsys.readouterr().out
    assert out.count("expt.models.stid.STID is expt.jobs.traffic.stid.STID now") == 1
    assert current("expt.jobs.traffic.stid.STID") == "expt.jobs.traffic.stid.STID"


def test_a_yaml_of_before_trains(expt, home: Path) -> None:
    (home / "conf/model").mkdir(parents=True)
    (home / "conf/model/old.yaml").write_text(
        "_target_: expt.models.stid.STID\nembed_dim: 8\nnum_layers: 1\ndropout: 0.1\n"
    )
    code, _, err = expt("--config-dir=conf", "model=old", "hydra.run.dir=run")
    assert code == 0, err
    assert load_result(home / "run").outcome.value == "completed"


def test_code_that_imports_an_old_module_is_told_the_new_one(expt, home: Path) -> None:
    (home / "my_data.py").write_text("from expt.data.series import Series\n")
    code, _, err = expt("data=traffic", "data._target_=my_data.MyData")
    assert code == 2
    assert "expt.data" in err and "expt.jobs.traffic" in err


@pytest.mark.parametrize(
    ("module", "words"),
    [("expt.data.series", "expt.jobs.traffic.series now"), ("expt.models", "expt.jobs.")],
)
def test_where_a_module_went(module: str, words: str) -> None:
    assert words in hint(module)
    assert hint("pandas") == hint(None) == ""
