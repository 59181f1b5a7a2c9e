from __future__ import annotations

import sqlite3

import optuna
import pytest

from expt.errors import ConfigError, UserError
from expt.job import Metric
from expt.result import Outcome
from expt.search.metric import EARLIER, metric_of
from expt.search.space import Space
from expt.search.study import absolute_storage, default_storage, open_storage, open_study
from expt.search.trial import KIND, kind_of
from expt.search.winner import summarize

SPACE = {"space": {"x": 1}}


def opened(storage, objectives=("val/mae",), metric=EARLIER, **identity):
    return open_study(
        "mine",
        storage,
        optuna.samplers.RandomSampler(0),
        optuna.pruners.NopPruner(),
        list(objectives),
        metric,
        {**SPACE, **identity},
    )


def test_the_default_is_beside_the_tracking_store(home):
    assert default_storage("sqlite:///here/mlflow.db") == f"sqlite:///{home}/here/optuna.db"
    assert default_storage("http://host:5000") == f"sqlite:///{home}/outputs/optuna.db"
    assert default_storage(None) == f"sqlite:///{home}/outputs/optuna.db"


def test_the_default_of_one_project_is_not_that_of_another(home, monkeypatch):
    for name in ("my lab", "my%20lab"):
        (home / name).mkdir()
        monkeypatch.chdir(home / name)
        opened(open_storage(default_storage(None)))
        assert (home / name / "outputs/optuna.db").exists()


@pytest.mark.parametrize("text", ["sqlite:///a/optuna.db", "a/study.journal", "a/study.log"])
def test_a_study_is_found_again(home, text):
    opened(open_storage(text)).enqueue_trial({"x": 0.5})
    assert len(opened(open_storage(text)).trials) == 1


def test_another_space_is_refused_with_what_differs(home):
    storage = optuna.storages.InMemoryStorage()
    opened(storage, space={"x": 1, "y": 2})
    with pytest.raises(ConfigError, match=r"another space: y differs; .*search.study=mine_2"):
        opened(storage, space={"x": 1, "y": 3})


def test_another_budget_is_refused():
    storage = optuna.storages.InMemoryStorage()
    opened(storage, **{"memory.budget": "1GiB"})
    with pytest.raises(ConfigError, match=r"memory\.budget=1GiB, not 2GiB"):
        opened(storage, **{"memory.budget": "2GiB"})


def test_another_number_of_objectives_is_refused():
    storage = optuna.storages.InMemoryStorage()
    opened(storage)
    with pytest.raises(ConfigError, match=r"mine was begun with the directions MINIMIZE, and"):
        opened(storage, objectives=("val/mae", "peak_memory"))


def test_a_study_of_another_direction_is_refused():
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(study_name="mine", storage=storage, direction="maximize")
    with pytest.raises(ConfigError, match="directions MAXIMIZE"):
        opened(storage)


def test_a_study_that_something_else_made_is_refused():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(study_name="mine", storage=storage)
    study.tell(study.ask(), 1.0)
    with pytest.raises(ConfigError, match="were not made by a search"):
        opened(storage)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "neither a URL"),
        ("a/b.db", "ends in .journal"),
        ("foo://bar", "neither a URL"),
        ("sqlite:////proc/nowhere/optuna.db", "cannot be written"),
        ("postgresql+nonsense://u:secret@h/db", "neither a URL"),
    ],
)
def test_what_is_no_storage_is_one_line(home, text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_storage(text)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(home, monkeypatch):
    import sqlalchemy

    def refuse(*arguments, **settings):
        raise sqlalchemy.exc.OperationalError("select", {}, Exception("connection refused"))

    monkeypatch.setattr("expt.search.study.RDBStorage", refuse)
    with pytest.raises(UserError, match="does not answer: connection refused"):
        open_storage("postgresql://user:secret@localhost:1/db")


def test_a_worker_that_makes_the_tables_at_the_same_time_is_no_fault(home, monkeypatch):
    from sqlalchemy.exc import IntegrityError

    said = ['relation "studies" already exists', 'duplicate key value violates "pg_type"']
    made = object()

    def make(*arguments, **settings):
        if said:
            raise IntegrityError("CREATE TABLE", {}, Exception(said.pop()))
        return made

    monkeypatch.setattr("expt.search.study.RDBStorage", make)
    monkeypatch.setattr("expt.search.study.time.sleep", lambda seconds: None)
    assert open_storage("postgresql://user@localhost/db") is made
    said = ["duplicate key"] * 100
    with pytest.raises(UserError, match="does not answer: duplicate key"):
        open_storage("postgresql://user@localhost/db")


def test_a_driver_that_is_missing_is_one_line(home, monkeypatch):
    def refuse(*arguments, **settings):
        raise ImportError("no module named psycopg")

    monkeypatch.setattr("expt.search.study.RDBStorage", refuse)
    with pytest.raises(UserError, match=r"pip install 'expt\[sql\]'"):
        open_storage("postgresql://user@localhost/db")


def test_tables_of_an_older_version_are_refused_with_the_command(home):
    open_storage("sqlite:///old.db")
    with sqlite3.connect("old.db") as database:
        database.execute("update alembic_version set version_num = 'v2.6.0.a'")
        database.execute("update version_info set schema_version = 11")
    with pytest.raises(UserError, match=r"optuna storage upgrade --storage sqlite:///old.db"):
        open_storage("sqlite:///old.db")


def test_a_file_that_is_no_database_is_one_line(home):
    (home / "some.db").write_text("not a database " * 100)
    with pytest.raises(UserError, match="does not answer: file is not a database"):
        open_storage("sqlite:///some.db")


def test_a_storage_is_written_down_with_an_absolute_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_storage("a/s.journal") == f"{tmp_path}/a/s.journal"
    assert absolute_storage("sqlite:///a/s.db") == f"sqlite:///{tmp_path}/a/s.db"
    assert absolute_storage("postgresql://me@host/db") == "postgresql://me@host/db"


def test_a_path_that_can_be_no_database_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(UserError, match=r"this is a folder; name a file in it, like sqlite:///.*"):
        open_storage(f"sqlite:///{tmp_path}/folder.db")
    (tmp_path / "broken.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(UserError, match="the file may be damaged"):
        open_storage(f"sqlite:///{tmp_path}/broken.db")
    open_storage(f"sqlite:///{tmp_path}/sound.db")
    monkeypatch.setattr("os.access", lambda path, mode: path.name != "sound.db")
    with pytest.raises(UserError, match=r"sound.db: it may not be written"):
        open_storage(f"sqlite:///{tmp_path}/sound.db")


def test_a_metric_that_is_to_be_high_is_maximized_and_kept():
    storage = optuna.storages.InMemoryStorage()
    accuracy = Metric("accuracy", goal="max", label="accuracy")
    study = opened(storage, ("val/accuracy", "peak_memory"), accuracy)
    assert [one.name for one in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert metric_of(study) == accuracy
    with pytest.raises(ConfigError, match=r"directions MAXIMIZE, MINIMIZE, and .* ask for MIN"):
        opened(storage, ("val/accuracy", "peak_memory"), Metric("accuracy"))


def test_a_study_of_an_earlier_version_is_gone_on_with():
    """It kept no metric, fewer settings, other modules, and other words for how trials ended."""
    storage = optuna.storages.InMemoryStorage()
    begun = optuna.create_study(study_name="mine", storage=storage)
    setting = {"model._target_": "expt.models.stid.STID", "trainer.epochs": 4}
    known = {"objectives": ["val/mae"], "setting": setting, **SPACE}
    for name, value in known.items():
        begun.set_user_attr(f"expt.{name}", value)
    trial = begun.ask()
    trial.set_user_attr(KIND, "complete")
    begun.tell(trial, 3.5)
    now = {"model._target_": "expt.jobs.traffic.stid.STID", "trainer.epochs": 4,
           "trainer.monitor": None, "memory.batch_norm": "batch"}  # fmt: skip
    study = opened(storage, setting=now)
    assert metric_of(study) == EARLIER
    assert kind_of(study.trials[0]) is Outcome.completed
    found = summarize(study, 1, None, "here")
    assert (found.finished, found.best["val/mae"]) == (1, 3.5)
    with pytest.raises(ConfigError, match=r"another setting: trainer.monitor differs"):
        opened(storage, setting={**now, "trainer.monitor": "rmse"})
    with pytest.raises(ConfigError, match=r"another setting: memory.batch_norm differs"):
        opened(storage, setting={**now, "memory.batch_norm": "frozen"})
    with pytest.raises(ConfigError, match=r"another setting: model.width differs"):
        opened(storage, setting={**now, "model.width": 8})


def test_a_range_that_an_earlier_version_drew_evenly_is_said_to_be_so():
    storage = optuna.storages.InMemoryStorage()
    opened(storage, space=Space.parse({"x": "range(8,256)", "y": "range(1,4)"}).as_json())
    for other, said in (("range(1,4)", True), ("range(1,9)", False)):
        space = Space.parse({"x": "tag(log,range(8,256))", "y": other}).as_json()
        with pytest.raises(ConfigError) as refused:
            opened(storage, space=space)
        assert "drew the range of x evenly" in str(refused.value)
        assert ("another space: x differs" in str(refused.value)) is said


@pytest.mark.parametrize("text", ["sqlite:///a/optuna.db", "a/study.journal"])
def test_a_study_with_a_setting_that_is_not_a_number_is_gone_on_with(home, text):
    """Read back, it is another object, which no comparison takes for the first."""

    def settings(fill):
        space = Space.parse({"data.fill": "choice(nan,0.0)"})
        return {"space": space.as_json(), "setting": {"data.fill": fill, "data.scales": [fill, 1]}}

    opened(open_storage(text), **settings(float("nan")))
    opened(open_storage(text), **settings(float("nan")))
    with pytest.raises(ConfigError, match=r"another setting: data\.fill, data\.scales differ"):
        opened(open_storage(text), **settings(0.0))
