from __future__ import annotations

import shutil

import optuna
import pytest

from expt.errors import ConfigError
from expt.search import study as folders
from expt.search.study import claim


@pytest.fixture
def study():
    return optuna.create_study(study_name="mine")


def test_a_folder_is_claimed_once_and_known_again_wherever_it_is(study, tmp_path):
    claim(study, tmp_path / "here")
    claim(study, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "moved")
    claim(study, tmp_path / "moved")


def test_a_worker_in_another_folder_is_refused(study, tmp_path):
    claim(study, tmp_path / "here")
    with pytest.raises(ConfigError, match=r"kept in .*here on .*hydra\.sweep\.dir=FOLDER"):
        claim(study, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_folder_of_another_study_is_refused(study, tmp_path):
    claim(study, tmp_path / "here")
    other = optuna.create_study(study_name="other")
    claim(other, tmp_path / "there")
    with pytest.raises(ConfigError, match="the study mine is kept in"):
        claim(study, tmp_path / "there")


def test_a_folder_that_was_removed_is_begun_anew(study, tmp_path):
    claim(study, tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    claim(study, tmp_path / "there")
    with pytest.raises(ConfigError, match=r"kept in .*there"):
        claim(study, tmp_path / "here")


def test_a_folder_of_another_machine_cannot_be_known_to_be_gone(study, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "identity", lambda: {"host": "node1"})
    claim(study, tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setattr(folders, "identity", lambda: {"host": "node2"})
    with pytest.raises(ConfigError, match="on node1"):
        claim(study, tmp_path / "here")


@pytest.mark.parametrize("left", ["study.token", "trial_000/result.json"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_new_study_does_not_take_over_what_another_left(study, tmp_path, left, begun):
    if begun:  # in a folder that was removed
        claim(study, tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
    path = tmp_path / "here" / left
    path.parent.mkdir(parents=True)
    path.write_text("anything")
    with pytest.raises(ConfigError, match=r"here holds another search.*search\.study=mine_2"):
        claim(study, tmp_path / "here")
    assert path.read_text() == "anything"


def test_a_study_of_an_earlier_version_keeps_the_folder_of_its_trials(study, tmp_path):
    study.tell(study.ask(), 1.0)
    (tmp_path / "here/trial_000").mkdir(parents=True)
    claim(study, tmp_path / "here")
    claim(study, tmp_path / "here")
    with pytest.raises(ConfigError, match="holds another search"):
        claim(optuna.create_study(study_name="other"), tmp_path / "here")


def test_a_folder_that_was_removed_may_be_begun_anew_in_its_place(study, tmp_path):
    """Also by a worker that was killed before it could write the token."""
    claim(study, tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "here").mkdir()  # as the lock makes it
    claim(study, tmp_path / "here")
    claim(study, tmp_path / "here")
