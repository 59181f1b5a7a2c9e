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
