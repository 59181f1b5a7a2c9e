"""Files that a disk has damaged: a run goes on from what is left, and says what it was."""

from __future__ import annotations

import pytest

from expt.result import load_result

LINE = ("hydra.run.dir=run", "trainer.epochs=3", "trainer.schedule=constant", "memory.plan=false")
STOPPING = """
import os
import signal
from expt.jobs.traffic.stid import STID


class Net(STID):
    left = 10

    def forward(self, *args, **others):
        Net.left -= self.training
        if Net.left == 0 and "LAB" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(*args, **others)
"""


@pytest.fixture
def stopped(expt, home, monkeypatch):
    """A run that was stopped in its third epoch, and the weights of the undisturbed one."""
    (home / "lab_damage.py").write_text(STOPPING)
    line = (*LINE, "model=stid", "model._target_=lab_damage.Net")
    assert expt(*line, "hydra.run.dir=whole")[0] == 0
    monkeypatch.setenv("LAB", "stop")
    import sys

    del sys.modules["lab_damage"]
    assert expt(*line)[0] == 143
    monkeypatch.delenv("LAB")
    return home / "run", load_result(home / "whole").weights_sha256


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(expt, stopped) -> None:
    run, expected = stopped
    cut(run / "checkpoints/last.pt")
    code, out, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert "last.pt is damaged" in out and "going on from previous.pt, step 8" in out
    result = load_result(run)
    assert (result.resumed_from_step, result.weights_sha256) == (8, expected)


def test_with_both_damaged_the_best_weights_are_what_is_left(expt, stopped) -> None:
    run, _ = stopped
    for name in ("last", "previous"):
        cut(run / f"checkpoints/{name}.pt")
    code, out, err = expt("trainer.resume=run", small=False)
    assert code == 0, err
    assert "going on from best.pt, step" in out and "without the optimizer's state" in out
    assert load_result(run).epochs == 3


def test_with_all_damaged_that_is_said(expt, stopped) -> None:
    run, _ = stopped
    for name in ("last", "previous", "best"):
        (run / f"checkpoints/{name}.pt").write_bytes(b"\0" * 100)
    code, _, err = expt("trainer.resume=run", small=False)
    assert code == 2
    assert "last.pt is damaged" in err and "nothing is left to go on from" in err
    assert "Traceback" not in err


def test_a_damaged_launch_file_is_called_damaged(expt, stopped) -> None:
    run, _ = stopped
    (run / "launch.json").write_text('{"overr')
    code, _, err = expt("trainer.resume=run", small=False)
    assert code == 2
    assert "its launch.json, which says how the run was started, is damaged" in err
    code, _, err = expt(*LINE)
    assert code == 2 and "already holds a run" in err
    code, out, err = expt("task=predict", "predict.run=run", "hydra.run.dir=new", small=False)
    assert code == 0, err
    assert "launch.json is damaged; the checkpoint's settings are used" in out
