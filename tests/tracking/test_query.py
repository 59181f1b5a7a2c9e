"""What is found again in a real SQLite store."""

from __future__ import annotations

import pytest

from expt.tracking.query import NotThereError, runs_of_experiment, runs_under
from expt.tracking.store import CHANGED


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store with a parent, a child, a grandchild and a run of their own, and their ids."""
    from mlflow import MlflowClient

    from expt.tracking.store import MlflowStore

    uri = f"sqlite:///{tmp_path_factory.mktemp('search') / 'mlflow.db'}"
    MlflowStore(uri)
    client = MlflowClient(uri)
    experiment = client.create_experiment("looked for")

    def make(name: str, parent: str | None = None, **metrics: float) -> str:
        tags = {"mlflow.parentRunId": parent} if parent else {}
        run_id = client.create_run(experiment, run_name=name, tags=tags, start_time=5000)
        for key, value in metrics.items():
            client.log_metric(run_id.info.run_id, key, value, step=1)
            client.log_metric(run_id.info.run_id, key, value / 2, step=2)
        client.log_param(run_id.info.run_id, "model.width", "7")
        client.set_terminated(run_id.info.run_id, "FINISHED")
        return str(run_id.info.run_id)

    parent = make("parent")
    child = make("child", parent, mae=4.0)
    return uri, {
        "parent": parent,
        "child": child,
        "grandchild": make("grandchild", child),
        "alone": make("alone", mae=8.0),
    }


def test_runs_are_found_at_any_depth_under_a_run(stored) -> None:
    uri, ids = stored
    assert {run.name for run in runs_under(uri, ids["parent"])} == {"child", "grandchild"}
    assert [run.run_id for run in runs_under(uri, ids["alone"])] == [ids["alone"]]


def test_a_run_has_its_last_metrics_and_its_parameters(stored) -> None:
    uri, ids = stored
    run = next(run for run in runs_under(uri, ids["parent"]) if run.name == "child")
    assert run.metrics == {"mae": 2.0}
    assert run.parameters == {"model.width": "7"}
    assert (run.status, run.started_seconds) == ("FINISHED", 5.0)


def test_a_parameter_is_what_it_was_changed_to(stored) -> None:
    from mlflow import MlflowClient

    uri, ids = stored
    MlflowClient(uri).set_tag(ids["grandchild"], f"{CHANGED}model.width", "9")
    found = {run.name: run.parameters["model.width"] for run in runs_under(uri, ids["parent"])}
    assert found == {"child": "7", "grandchild": "9"}


def test_a_filter_chooses_among_an_experiments_runs(stored) -> None:
    uri, _ = stored
    assert len(runs_of_experiment(uri, "looked for")) == 4
    assert [run.name for run in runs_of_experiment(uri, "looked for", "metrics.mae < 3")] == [
        "child"
    ]


def test_what_is_not_there_is_said(stored, tmp_path) -> None:
    uri, _ = stored
    with pytest.raises(NotThereError, match=r"no experiment 'typo'; there are: .*looked for"):
        runs_of_experiment(uri, "typo")
    with pytest.raises(NotThereError, match="cannot be searched with 'metrics mae'"):
        runs_of_experiment(uri, "looked for", "metrics mae")
    with pytest.raises(NotThereError, match="has no run 0123"):
        runs_under(uri, "0123" * 8)
    missing = tmp_path / "no.db"
    with pytest.raises(NotThereError, match=r"there is no tracking store .*no\.db"):
        runs_under(f"sqlite:///{missing}", "0123" * 8)
    assert not missing.exists()


def test_a_run_that_was_deleted_is_not_there(stored) -> None:
    from mlflow import MlflowClient

    uri, ids = stored
    MlflowClient(uri).delete_run(ids["alone"])
    with pytest.raises(NotThereError, match=r"was deleted from .* brings it back"):
        runs_under(uri, ids["alone"])
    MlflowClient(uri).restore_run(ids["alone"])


def test_a_server_that_does_not_answer_is_said_without_its_password() -> None:
    with pytest.raises(NotThereError, match="does not answer") as raised:
        runs_of_experiment("http://me:secret@127.0.0.1:9", "x")
    assert "secret" not in str(raised.value)


def test_a_server_that_goes_away_while_runs_are_read(stored, monkeypatch) -> None:
    from expt.tracking import query as search

    def gone(*arguments: object) -> None:
        raise ConnectionError("it went away")

    uri, ids = stored
    monkeypatch.setattr(search, "_search", gone)
    with pytest.raises(NotThereError, match="does not answer: it went away"):
        runs_under(uri, ids["parent"])
