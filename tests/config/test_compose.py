from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from expt.config.compose import key, prepare_arguments, readable_setting, setting, typed
from expt.errors import ConfigError
from expt.result import save_launch


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """Return the folder of a run that was started with a choice of three groups."""
    lines = ["experiment=probe", "debug=smoke", "+memory=lite", "trainer.epochs=2"]
    save_launch(tmp_path, {"overrides": lines, "cwd": str(Path.cwd()), "config_dir": None})
    return tmp_path


@pytest.mark.parametrize("named", ["trainer.resume", "predict.run", "export.run", "rollout.run"])
def test_nothing_takes_the_place_of_an_earlier_choice(started: Path, named: str) -> None:
    nothing = ("experiment=null", "debug=", "memory=null")
    lines = prepare_arguments([f"{named}={started}", *nothing])
    assert not {key(line) for line in lines} & {"experiment", "debug", "memory"}
    assert "trainer.epochs=2" in lines


def test_a_choice_that_is_not_taken_back_is_kept(started: Path) -> None:
    lines = prepare_arguments([f"trainer.resume={started}", "experiment=null"])
    assert {"debug=smoke", "+memory=lite"} < set(lines)
    assert prepare_arguments(["experiment=null", "model=stid"]) == ["model=stid"]


def test_a_group_that_needs_a_choice_is_not_set_to_nothing() -> None:
    with pytest.raises(ConfigError, match="model=null: one must be chosen"):
        prepare_arguments(["model=null"])


@pytest.mark.parametrize("name", ["my runs", "a=1", "a,b", "lr=[1]", "a (1)", 'the "x"', "it's"])
def test_a_folder_can_be_typed_whatever_its_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    for line in (setting("report.runs", folder), readable_setting("report.runs", folder)):
        parsed = OverridesParser.create().parse_override(line)
        assert not parsed.is_sweep_override() and parsed.value() == str(folder)
    save_launch(folder, {"overrides": [], "cwd": str(Path.cwd()), "config_dir": None})
    lines = prepare_arguments(shlex.split(typed("trainer.resume", folder)))
    assert lines == ["trainer.resume=true", setting("hydra.run.dir", folder)]


def test_a_plain_name_is_typed_as_it_is() -> None:
    assert typed("trainer.resume", "/home/me/runs/2026-11-30") == (
        "trainer.resume=/home/me/runs/2026-11-30"
    )
