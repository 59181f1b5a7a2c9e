"""What a study is opened with: its budget, and the points that are tried first."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from expt.errors import ConfigError
from expt.result import RunResult
from expt.search.opening import (
    WORKERS,
    none_left_behind,
    put_first,
    settle_data,
    settled_budget,
)
from expt.search.study import claim
from expt.search.trial import FROM
from expt.units import GIB


@pytest.fixture
def study(tmp_path):
    return optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path}/s.db")


def test_a_share_is_what_it_was_when_the_study_was_begun(study):
    assert settled_budget(study, 64 * GIB, "80%", 80 * GIB) == 64 * GIB
    assert settled_budget(study, 70 * GIB, "80%", 88 * GIB) == 64 * GIB
    assert settled_budget(study, 19 * GIB, "80%", None) == 64 * GIB, "another machine has the card"
    with pytest.raises(
        ConfigError, match=r"memory\.budget=80% is 64\.00 GiB, and .* 24\.00 GiB here"
    ):
        settled_budget(study, 19 * GIB, "80%", 24 * GIB)


def test_without_a_budget_there_is_none(study):
    assert settled_budget(study, None, None, None) is None


def waiting(study):
    return [t for t in study.get_trials() if t.state is TrialState.WAITING]


def test_a_point_is_put_first_once_also_when_it_is_given_later(study):
    study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
    for point in ({"x": 0.25, "y": 8}, {"x": 0.5}, {"x": 0.25, "y": 8}, {"x": 0.5}):
        put_first(study, point)
    assert [t.system_attrs["fixed_params"] for t in waiting(study)] == [
        {"x": 0.25, "y": 8}, {"x": 0.5},
    ]  # fmt: skip


def test_what_an_earlier_study_tried_was_not_tried_here(study):
    distributions = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    shown = create_trial(
        params={"x": 0.25}, distributions=distributions, value=1.0, user_attrs={FROM: "first 0"}
    )
    study.add_trials([shown, create_trial(params={"x": 0.5}, distributions=distributions, value=2)])
    for x in (0.25, 0.5):
        put_first(study, {"x": x})
    assert [t.system_attrs["fixed_params"] for t in waiting(study)] == [{"x": 0.25}]


def begun_on(study, folder, data):
    """Add a trial as an earlier version left it."""
    RunResult("completed", "epochs", data_fingerprint=data).save(folder)
    study.add_trial(create_trial(
        params={"data.batch_size": 4}, value=1.0, user_attrs={"run_dir": str(folder)},
        distributions={"data.batch_size": optuna.distributions.IntDistribution(1, 8)},
    ))  # fmt: skip


@pytest.mark.parametrize("earlier", [False, True])
def test_a_study_does_not_go_on_over_other_data(study, tmp_path, earlier):
    if earlier:
        begun_on(study, tmp_path, "abc")
    settle_data(study, None)
    settle_data(study, "abc")
    settle_data(study, "abc")
    settle_data(study, None)  # where they are not, or are varied
    with pytest.raises(ConfigError, match=r"other data .*abc, and here xyz.*search\.study=s_2"):
        settle_data(study, "xyz")
    settle_data(study, "abc")


def test_what_an_earlier_version_read_otherwise_is_a_note(study, tmp_path, capsys):
    """Its mark is of the same file, maybe; nobody knows."""
    begun_on(study, tmp_path, "abc")
    settle_data(study, "xyz")
    assert "earlier version" in capsys.readouterr().out
    settle_data(study, "xyz")
    assert capsys.readouterr().out == ""


def test_a_study_that_is_refused_as_it_is_made_leaves_nothing_behind(study, tmp_path):
    storage = study._storage
    folder = tmp_path / "new"
    for _ in range(2):  # it is free again, too
        with pytest.raises(ConfigError, match="preset"), none_left_behind("new", storage, folder):
            claim(optuna.create_study(study_name="new", storage=storage), folder)
            raise ConfigError("a preset does not go with these settings")
    claim(study, tmp_path)
    for name, folder in (("s", tmp_path), ("new", tmp_path)):  # what is another's stays
        with pytest.raises(ConfigError), none_left_behind(name, storage, folder):
            raise ConfigError("another space, or another's folder")
        claim(study, tmp_path)
    with pytest.raises(ConfigError), none_left_behind("shared", storage, tmp_path / "shared"):
        shared = optuna.create_study(study_name="shared", storage=storage)
        shared.set_user_attr(WORKERS, 2)  # another one has joined meanwhile
        raise ConfigError("its retraining is refused")
    with pytest.raises(KeyboardInterrupt), none_left_behind("begun", storage, tmp_path):
        optuna.create_study(study_name="begun", storage=storage)
        raise KeyboardInterrupt
    assert sorted(optuna.get_all_study_names(storage)) == ["begun", "s", "shared"]
