"""Batches over a launcher, with one that runs nothing but writes what a job would."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from expt.errors import SearchError
from expt.result import Outcome, RunResult
from expt.search.launcher import LauncherRunner
from expt.search.runner import Job


class Launcher:
    """Writes a result for every job, as the settings say."""

    def __init__(self):
        self.batches = []
        self.first = []

    def launch(self, batch, initial_job_idx):
        self.batches.append([list(lines) for lines in batch])
        self.first.append(initial_job_idx)
        return [self._job(dict(line.split("=", 1) for line in lines)) for lines in batch]

    def _job(self, given):
        folder = Path(given["hydra.sweep.dir"].strip('"')) / given["hydra.sweep.subdir"]
        if given["what"] == "unreachable":
            raise RuntimeError("sbatch: command not found")
        if given["what"] == "refused":
            return SimpleNamespace(return_value=SimpleNamespace(exit_code=2, error="no such width"))
        if given["what"] == "crash":
            return Raising()
        folder.mkdir(parents=True, exist_ok=True)
        if given["what"] == "dead":
            (folder / "expt.log").touch()
            return None
        if given["what"] == "slow":
            (folder / "expt.log").touch()
            late = RunResult("completed", "epochs")
            late.metrics["val/mae"] = 5.0
            self.timer = threading.Timer(0.3, late.save, [folder])
            self.timer.start()
            return None
        result = RunResult("completed", "epochs")
        result.metrics["val/mae"] = float(given.get("trainer.seed", 3))
        folder.mkdir(parents=True, exist_ok=True)
        result.save(folder)
        if given["what"] == "all_lost":
            raise RuntimeError("job 17 was killed")
        return SimpleNamespace(return_value=result)


class Raising:
    @property
    def return_value(self):
        raise ValueError("shapes do not match")


@pytest.fixture
def launcher():
    return Launcher()


def job(folder, number, what, seeds=(0,)):
    return Job(number, [f"what={what}"], folder / f"trial_{number:03d}", seeds)


def test_a_batch_is_launched_together_and_ends_together(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path)
    trials = [runner.start(job(tmp_path, number, "good")) for number in (4, 5)]
    assert [trial.poll() for trial in trials] == [None, None]
    runner.flush()
    assert len(launcher.batches) == 1
    assert launcher.first == [4]
    assert "hydra.sweep.subdir=trial_005" in launcher.batches[0][1]
    assert f'hydra.sweep.dir="{tmp_path}"' in launcher.batches[0][1]
    assert [trial.poll().value for trial in trials] == [3.0, 3.0]
    runner.flush()
    assert len(launcher.batches) == 1, "nothing is left to launch"


def test_a_trial_that_was_lost_before_its_batch_is_not_launched(launcher, tmp_path):
    """Another worker has it, and would write to the same folder."""
    runner = LauncherRunner(launcher, tmp_path)
    lost, kept = (runner.start(job(tmp_path, number, "good")) for number in (4, 5))
    lost.kill()
    runner.flush()
    ((launched,),) = launcher.batches
    assert "hydra.sweep.subdir=trial_005" in launched and launcher.first == [5]
    assert not (tmp_path / "trial_004" / "result.json").exists()
    assert kept.poll().value == 3.0
    runner.start(job(tmp_path, 6, "good")).kill()
    runner.flush()
    assert len(launcher.batches) == 1, "nothing is left to launch"


def test_a_stop_does_not_wait_for_a_batch_that_is_never_launched(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path)
    trial = runner.start(job(tmp_path, 0, "good"))
    assert trial.poll() is None
    trial.stop("signal")
    assert trial.poll().kind is Outcome.killed, "it is left to the next worker"
    runner.flush()
    assert launcher.batches == []


def test_a_job_that_goes_wrong_costs_itself_alone(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path)
    kinds = ("good", "refused", "crash")
    trials = [runner.start(job(tmp_path, number, kind)) for number, kind in enumerate(kinds)]
    runner.flush()
    found = [trial.poll() for trial in trials]
    assert [outcome.kind.value for outcome in found] == ["completed", "refused", "failed"]
    assert found[1].error == "no such width"
    assert found[2].error == "shapes do not match"


def test_what_a_lost_batch_has_written_is_not_lost(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path, silent_seconds=0.0)
    done = runner.start(job(tmp_path, 0, "all_lost"))
    lost = runner.start(job(tmp_path, 1, "good"))
    runner.flush()
    assert done.poll().kind is Outcome.completed
    assert lost.poll().kind is Outcome.killed


def test_what_a_lost_job_was_lost_of_is_said(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path, silent_seconds=0.0)
    lost, killer = (
        runner.start(job(tmp_path, n, what)) for n, what in enumerate(["dead", "all_lost"])
    )
    runner.flush()
    assert lost.poll().error == "lost by hydra's launcher: job 17 was killed"
    assert killer.poll().value == 3.0


def test_a_launcher_that_cannot_start_costs_no_trial(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path)
    trial = runner.start(job(tmp_path, 0, "unreachable"))
    with pytest.raises(SearchError, match=r"started none of its jobs: sbatch: command not found"):
        runner.flush()
    assert trial.poll() is None, "nothing became of it, and it is done the next time"


def test_a_job_that_goes_on_after_its_batch_was_given_up_is_waited_for(
    launcher, tmp_path, monkeypatch
):
    monkeypatch.setattr("expt.search.launcher.LOOK_SECONDS", 0.01)
    runner = LauncherRunner(launcher, tmp_path, silent_seconds=30.0)
    slow = runner.start(job(tmp_path, 0, "slow"))
    runner.start(job(tmp_path, 1, "all_lost"))
    runner.flush()
    assert slow.poll().value == 5.0


def test_other_workers_hear_of_us_while_a_batch_runs(launcher, tmp_path, monkeypatch):
    monkeypatch.setattr("expt.search.launcher.BEAT_SECONDS", 0.01)
    beats = []
    usual = launcher.launch

    def slowly(batch, initial_job_idx):
        deadline = time.monotonic() + 10
        while len(beats) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return usual(batch, initial_job_idx)

    launcher.launch = slowly

    def beat():
        beats.append(threading.current_thread())
        raise RuntimeError("the storage is away for a moment")

    runner = LauncherRunner(launcher, tmp_path, beat=beat)
    trial = runner.start(job(tmp_path, 0, "good"))
    runner.flush()
    assert len(beats) >= 2
    assert trial.poll().kind is Outcome.completed
    assert not beats[0].is_alive(), "and no more afterwards"


def test_a_trial_that_is_lost_during_a_seed_is_not_launched_with_the_next(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path)
    lost, kept = (runner.start(job(tmp_path, n, "good", seeds=(1, 2))) for n in (0, 1))
    launch = launcher.launch

    def taken(batch, initial_job_idx):
        lost.kill()  # as the beat does, which runs meanwhile
        return launch(batch, initial_job_idx)

    launcher.launch = taken
    runner.flush()
    assert [len(batch) for batch in launcher.batches] == [2, 1]
    assert "hydra.sweep.subdir=trial_001/seed_2" in launcher.batches[1][0]
    assert kept.poll().value == 1.5


def test_seeds_are_launched_in_turn(launcher, tmp_path):
    runner = LauncherRunner(launcher, tmp_path)
    trial = runner.start(job(tmp_path, 0, "good", seeds=(1, 2)))
    runner.flush()
    assert len(launcher.batches) == 2
    assert "hydra.sweep.subdir=trial_000/seed_2" in launcher.batches[1][0]
    assert trial.poll().value == 1.5
