from __future__ import annotations

import json

import pytest

from expt.errors import ConfigError
from expt.reports.records import RunSet, ranked_by
from expt.reports.sources.folders import matching, read_run, run_folders, runs_in_folders


def ranked(patterns):
    return ranked_by(runs_in_folders(patterns), None)


def read(folder, metric=None):
    return ranked_by(RunSet((read_run(folder, "a"),), "here"), metric).records[0]


def test_every_run_under_a_folder_in_the_order_of_starting(tmp_path, put_run) -> None:
    put_run(tmp_path / "grid/0", 4.0, started=300)
    put_run(tmp_path / "grid/1", 3.0, started=200)
    put_run(tmp_path / "other/0", 5.0, started=100)
    runs = ranked([str(tmp_path)])
    assert [(r.name, r.value) for r in runs.records] == [
        ("other/0", 5.0),
        ("grid/1", 3.0),
        ("grid/0", 4.0),
    ]
    assert runs.notes == ()


def test_a_run_is_read_as_it_stands(tmp_path, put_run) -> None:
    folder = put_run(tmp_path / "a", 3.5, peak=1000, predicted=1010, budget=2000, embed_dim=96)
    run = read(folder)
    assert (run.outcome.value, run.value, run.preset, run.seconds) == (
        "completed",
        3.5,
        "lite",
        12.5,
    )
    assert (run.peak_allocated_bytes, run.predicted_peak_bytes, run.budget_bytes) == (
        1000,
        1010,
        2000,
    )
    assert run.prediction_error == pytest.approx(0.01)
    assert run.settings["model.embed_dim"] == "96"
    assert run.settings["model.patch_sizes"] == "[1, 2]"
    assert run.metrics == {"val/mae": 3.5, "test/mae": 3.7}
    assert read(folder, "test/mae").value == 3.7


@pytest.mark.parametrize(
    ("status", "reason", "state"),
    [
        ("failed", "out_of_memory", "out_of_memory"),
        ("failed", "RecoveryError: nothing left", "out_of_memory"),
        ("failed", "non_finite_loss", "diverged"),
        ("failed", "BrokenStepError: half of it", "out_of_memory"),
        ("stopped", "signal", "stopped"),
    ],
)
def test_how_a_run_ended(tmp_path, put_run, status, reason, state) -> None:
    folder = put_run(tmp_path / "a", 9.0, status=status, stop_reason=reason)
    run = read(folder)
    assert (run.outcome.value, run.value) == (state, None), "an error of half a training is none"


def test_a_run_without_a_result_is_unfinished(tmp_path, put_run) -> None:
    folder = put_run(tmp_path / "a")
    (folder / "result.json").unlink()
    run = ranked([str(tmp_path)]).records[0]
    assert (run.outcome.value, run.preset, run.value) == ("unfinished", "lite", None)
    assert run.detail == "no result was written"
    (folder / "result.json").write_text("{")
    assert ranked([str(tmp_path)]).records[0].detail == "result.json cannot be read"


def test_copies_and_other_tasks_folders_are_no_runs(tmp_path, put_run) -> None:
    put_run(tmp_path / "runs/a")
    copy = put_run(tmp_path / "artifacts/1234/artifacts")
    (copy / "launch.json").unlink()
    expansion = tmp_path / "expand"
    expansion.mkdir()
    (expansion / "launch.json").write_text("{}")
    assert [path.name for path in run_folders(tmp_path)] == ["a"]


def test_globs_and_several_folders_count_a_run_once(tmp_path, put_run) -> None:
    for name in ("a1", "a2", "b1"):
        put_run(tmp_path / name)
    found = runs_in_folders([str(tmp_path / "a*"), str(tmp_path / "a1")])
    assert sorted(r.name for r in found.records) == ["a1", "a2"]
    assert len(runs_in_folders([str(tmp_path / "b1")]).records) == 1


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nowhere", "this folder is not there"),
        ("none*", "this glob matches no folder"),
        ("file", "is a file; give the folder"),
        ("empty", "there is no run in"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, monkeypatch, pattern, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"report\.runs") as raised:
        runs_in_folders([pattern])
    assert words in str(raised.value)
    assert pattern in str(raised.value)


def test_a_config_that_cannot_be_read_leaves_the_rest(tmp_path, put_run) -> None:
    folder = put_run(tmp_path / "a")
    (folder / "config.yaml").write_text("a: [1")
    run = read(folder)
    assert (run.settings, run.value) == ({}, 4.0)


def test_a_study_that_cannot_be_read_becomes_a_note(tmp_path, put_run) -> None:
    put_run(tmp_path / "trial_0")
    summary = {"study": "gone", "n_trials": 1, "storage": f"sqlite:///{tmp_path}/gone.db"}
    copy = tmp_path / "artifacts/1234/artifacts"  # is no other study
    copy.mkdir(parents=True)
    for folder in (tmp_path, copy):
        (folder / "sweep.json").write_text(json.dumps(summary))
    runs = ranked([str(tmp_path)])
    assert len(runs.records) == 1
    assert "the study gone is not read: there is no file" in runs.notes[0]
    assert not (tmp_path / "gone.db").exists(), "looking must not make it"


def test_a_home_is_understood(tmp_path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert matching("~/runs") == [tmp_path / "runs"]
