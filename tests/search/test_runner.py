"""Trials made of processes, with a stand-in for the command line that trains."""

from __future__ import annotations

import importlib
import json
import sys
import time

import pytest

from expt.result import Outcome, RunResult
from expt.search.runner import Job, ProcessRunner, ProcessTrial, combined
from expt.search.trial import TrialOutcome

PROGRAM = '''
import json, os, sys, time
from pathlib import Path

def run(lines):
    """Stand in for a training: write what it would, for the settings it was given."""
    from expt.result import RunResult

    given = dict(line.split("=", 1) for line in lines if "=" in line)
    folder = Path(json.loads(given["hydra.run.dir"]))
    (folder / "lines.json").write_text(json.dumps(lines))
    if given.get("what") == "hang":
        time.sleep(60)
    if given.get("what") == "epochs":
        (folder / "checkpoints").mkdir(exist_ok=True)
        progress = {"step": 4, "epoch": 2, "val/accuracy": 7.5}
        (folder / "checkpoints/progress.json").write_text(json.dumps(progress))
        time.sleep(60)
    result = RunResult("completed", "epochs", seconds=1.0)
    result.metrics["val/mae"] = float(given.get("trainer.seed", 0)) + 3.0
    result.memory["peak_allocated_bytes"] = 100 + int(given.get("trainer.seed", 0))
    if given.get("what") == "nan_at_1" and given["trainer.seed"] == "1":
        result.status, result.stop_reason = "failed", "non_finite_loss"
    result.save(folder)
    return 0
'''


@pytest.fixture
def run(home, monkeypatch):
    (home / "training_of_a_test.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(home))
    sys.modules.pop("training_of_a_test", None)
    yield importlib.import_module("training_of_a_test").run
    sys.modules.pop("training_of_a_test", None)


def ended(trial, seconds=20.0):
    until = time.monotonic() + seconds
    while (outcome := trial.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return outcome


def job(home, *lines, seeds=(0,), **settings):
    return Job(3, list(lines), home / "trial 3", seeds, **settings)


def test_a_trial_is_a_command_line_in_its_folder(run, home):
    found = ended(ProcessTrial(job(home, "model.x=1", plan={"peak_bytes": 5}), run, ["--flag=a"]))
    assert (found.kind, found.value, found.peak_bytes) == (Outcome.completed, 3.0, 100)
    folder = home / "trial 3"
    lines = json.loads((folder / "lines.json").read_text())
    assert lines == [
        "--flag=a",
        "model.x=1",
        "trainer.test=false",
        f'memory.plan_file="{folder}/plan.json"',
        "trainer.resume=true",
        f'hydra.run.dir="{folder}"',
    ]
    assert json.loads((folder / "plan.json").read_text()) == {"peak_bytes": 5}


def test_several_seeds_are_trained_in_turn_and_their_mean_counts(run, home):
    found = ended(ProcessTrial(job(home, seeds=(0, 1, 5)), run))
    assert found.value == pytest.approx(5.0)
    assert found.extra["values_by_seed"] == {"0": 3.0, "1": 4.0, "5": 8.0}
    assert found.extra["spread"] == pytest.approx(2.6457513)
    assert found.peak_bytes == 105
    for seed in (0, 1, 5):
        lines = json.loads((home / f"trial 3/seed_{seed}/lines.json").read_text())
        assert f"trainer.seed={seed}" in lines
        assert f'tracking.parent="{home}/trial 3"' in lines


def test_a_seed_that_goes_wrong_ends_the_trial(run, home):
    found = ended(ProcessTrial(job(home, "what=nan_at_1", seeds=(0, 1, 2)), run))
    assert found.kind is Outcome.diverged
    assert not (home / "trial 3/seed_2").exists()


def test_a_trial_that_hangs_past_its_limit_is_killed(run, home):
    trial = ProcessTrial(job(home, "what=hang", time_limit_seconds=0.5), run)
    found = ended(trial)
    assert found.kind is Outcome.timeout
    assert trial._process.seconds < 15


def test_an_epoch_is_told_once_and_a_pruned_trial_ends(run, home):
    trial = ProcessTrial(job(home, "what=epochs"), run)
    until = time.monotonic() + 20
    while not (epochs := trial.epochs()):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert epochs == [(2, 7.5)]
    assert trial.epochs() == []
    trial.stop("pruned")
    assert ended(trial).kind is Outcome.pruned


def test_trials_at_the_same_time_go_to_different_devices(run, home):
    runner = ProcessRunner(run, devices=["0", "1"])
    trials = [
        runner.start(Job(number, ["what=hang"], home / str(number), (0,))) for number in range(4)
    ]
    assert sorted(trial.device for trial in trials) == ["0", "0", "1", "1"]
    assert trials[0].device != trials[1].device
    for trial in trials:
        trial.kill()
    trials[0].poll()
    single = ProcessRunner(run, devices=["0"])
    trial = single.start(Job(9, ["what=hang"], home / "9", (0,)))
    assert trial.device is None
    trial.kill()


def test_a_complete_result_is_not_put_aside_by_the_next_attempt(run, home):
    result = RunResult("completed", "epochs")
    result.save(home / "trial 3")
    job(home).prepare()
    assert (home / "trial 3/result.json").exists()
    RunResult("failed", "x").save(home / "trial 3")
    job(home).prepare()
    assert not (home / "trial 3/result.json").exists()
    assert (home / "trial 3/result.attempt_1.json").exists()


def test_each_attempt_has_its_own_plan(home):
    """Its techniques may have been chosen anew."""
    for peak in (5, 7):
        job(home, plan={"peak_bytes": peak}).prepare()
        assert json.loads((home / "trial 3/plan.json").read_text()) == {"peak_bytes": peak}
    job(home, plan=None).prepare()
    assert not (home / "trial 3/plan.json").exists()


def test_one_seed_is_itself():
    outcome = TrialOutcome(Outcome.completed, 1.0, 5, 5, seconds=2.0, run_id="a")
    assert combined([outcome], [0]) == outcome


def test_what_recovered_in_any_seed_is_known_of_all():
    recovered = TrialOutcome(Outcome.completed, 1.0, 5, 5, seconds=2.0, extra={"oom_events": 2})
    plain = TrialOutcome(Outcome.completed, 2.0, 5, 5, seconds=2.0)
    assert combined([recovered, plain], [0, 1]).extra["oom_events"] == 2
    assert "oom_events" not in combined([plain, plain], [0, 1]).extra


def test_a_trial_that_is_stopped_as_a_seed_ends_does_not_begin_the_next(run, home):
    trial = ProcessTrial(job(home, seeds=(0, 1)), run)
    trial._process._process.join()
    trial.stop("signal")
    assert ended(trial).kind is Outcome.killed
    assert not (home / "trial 3/seed_1").exists()
