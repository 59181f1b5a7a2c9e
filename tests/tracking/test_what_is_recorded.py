"""What MLflow has of a run: one name per thing, once, and what there is to know about it."""

from __future__ import annotations

import json
import subprocess

import pytest

from expt.result import load_result


@pytest.fixture
def recorded(expt, home):
    from mlflow import MlflowClient

    subprocess.run(["git", "init", "-q", "."], check=True)
    subprocess.run(["git", "config", "user.email", "a@b.c"], check=True)
    subprocess.run(["git", "config", "user.name", "a"], check=True)
    (home / "code.py").write_text("x = 1\n")
    subprocess.run(["git", "add", "code.py"], check=True)
    subprocess.run(["git", "commit", "-qm", "first"], check=True)
    (home / "code.py").write_text("x = 2\n")
    code, out, err = expt("tracking=mlflow", "model=stid", "hydra.run.dir=run")
    assert code == 0, err
    result = load_result(home / "run")
    client = MlflowClient(result.tracking["uri"])
    return result, client, client.get_run(result.tracking["run_id"]), out


def test_a_name_is_one_thing_and_the_last_value_is_there_once(recorded) -> None:
    result, client, run, _ = recorded
    names = run.data.metrics
    assert names["best/val/mae"] == pytest.approx(result.metrics["val/mae"])
    assert not [name for name in names if name.startswith("best_val")]
    for name in names:
        points = client.get_metric_history(run.info.run_id, name)
        pairs = [(point.step, point.value) for point in points]
        assert len(pairs) == len(set(pairs)), name
    assert [p.step for p in client.get_metric_history(run.info.run_id, "val/mae")] == [4, 8]
    assert names["memory/peak_allocated_gib"] == names["memory/peak_allocated_bytes"] / 2**30


def test_parameters_are_of_this_task_only(recorded) -> None:
    _, _, run, _ = recorded
    groups = {name.partition(".")[0] for name in run.data.params}
    assert groups == {"task", "model", "data", "optimizer", "trainer", "memory", "loader"}


def test_tags_have_the_command_line_the_description_and_the_state_of_the_code(recorded) -> None:
    _, _, run, _ = recorded
    tags = run.data.tags
    assert tags["command"].startswith("python -m expt +memory=minimal debug=smoke")
    assert "STID on metr_la_29" in tags["mlflow.note.content"]
    assert tags["command"] in tags["mlflow.note.content"]
    assert tags["git.dirty"] == "1 changed files"
    assert len(tags["mlflow.source.git.commit"]) == 40


def test_the_data_are_an_input_of_the_run_and_the_model_has_a_signature(recorded) -> None:
    from mlflow.models import ModelSignature

    result, client, run, _ = recorded
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "metr_la_29"
    assert given.dataset.digest == result.data_fingerprint
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training"}
    names = {file.path for file in client.list_artifacts(run.info.run_id, "checkpoints")}
    assert "checkpoints/signature.json" in names
    stored = json.loads((result.run_dir / "signature.json").read_text())
    signature = ModelSignature.from_dict(stored)
    assert signature.inputs.input_names() == ["speed", "observed", "time_of_day", "day_of_week"]
    assert signature.outputs.inputs[0].shape == (-1, 12, 29)


def test_the_link_opens_the_table_of_runs(recorded) -> None:
    result, _, run, out = recorded
    link = f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs"
    assert f"runs: {link}  while this runs: mlflow ui --backend-store-uri sqlite:///" in out
    result.tracking["uri"] = "http://host:5000/"
    from expt.run.summary import runs_link

    assert (
        runs_link(result) == f"runs: http://host:5000/#/experiments/{run.info.experiment_id}/runs"
    )
