"""Several real processes of a toy job: what they compute, survive and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from expt.result import load_result
from expt.tracking.journal import State
from expt.training.checkpoint import read_progress

TOLERANCE = 1e-5
OF_WEIGHTS = 1e-4
"""Of the largest weight: an Adam step divides by a gradient's own size and enlarges rounding."""
PROGRAM = """
import os
import signal

import torch
from blobs import Classifier
from torch import nn

FAULT = os.environ.get("LAB", "")  # what happens, in which process, at which of its passes


class RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


class Net(Classifier):
    passes = 0

    def __init__(self, num_inputs, num_classes, width=16, dropout=0.0, batch_norm=False):
        super().__init__(num_inputs, num_classes, width, dropout, batch_norm)
        self.blocks = nn.ModuleList(nn.Linear(num_inputs, num_inputs) for _ in range(3))

    def forward(self, x):
        what, _, where = FAULT.partition("@")
        rank, _, at = where.partition(":")
        if self.training and rank == os.environ.get("RANK") and type(x) is torch.Tensor:
            Net.passes += 1
            if str(Net.passes) in at.split(","):
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "bug":
                    raise ValueError("a bug in one process")
                if what == "forward":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
                if what == "backward":
                    x = RaiseInBackward.apply(x.requires_grad_())
        x = x.flatten(1)
        for block in self.blocks:
            x = x + block(x).tanh()
        return super().forward(x)


class LackingSGD(torch.optim.SGD):
    def step(self, closure=None):
        what, _, where = FAULT.partition("@")
        rank, _, at = where.partition(":")
        LackingSGD.steps = getattr(LackingSGD, "steps", 0) + 1
        if what == "step" and rank == os.environ.get("RANK") and str(LackingSGD.steps) in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().step(closure)
"""


@pytest.fixture
def job(toys: Path, clips: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that gives the command line of a toy job whose processes can be made to fail."""
    (home / "failing.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{home}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.syspath_prepend(str(home))

    def line(data: str, run: str, *more: str) -> tuple[str, ...]:
        return (
            f"--config-dir={toys / 'conf'}", f"data={data}", "model=classifier",
            "model._target_=failing.Net", "tracking=none", "trainer.progress=false",
            "trainer.checkpoint_every_steps=2", "memory.plan=false",
            "data.batch_size=7", "data.eval_batch_size=5", "loader.num_workers=0",
            f"hydra.run.dir={run}", *more,
            *(() if "optimizer.lr" in " ".join(more) else ("optimizer.lr=0.01",)),
            *(() if "trainer.epochs" in " ".join(more) else ("trainer.epochs=2",)),
        )  # fmt: skip

    return line


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]


def assert_the_same(found: Path, expected: Path) -> None:
    """Check that two runs ended with the same weights, losses and figures, to rounding."""
    ours, theirs = load_result(found), load_result(expected)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=TOLERANCE)
    histories = [json.loads((run / "history.json").read_text()) for run in (found, expected)]
    losses = [[row["loss"] for row in history] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    stored = weights(expected)
    for name, weight in weights(found).items():
        largest = float(stored[name].abs().max())
        torch.testing.assert_close(weight, stored[name], rtol=0, atol=OF_WEIGHTS * largest)


# Of blobs, sharded ones are compared with one process in other tests of this file.
@pytest.mark.parametrize(
    ("data", "strategies"), [("blobs", ["ddp"]), ("clips", ["ddp", "fsdp"])], ids=["blobs", "clips"]
)
def test_several_processes_compute_what_one_does(expt, job, home, data, strategies) -> None:
    # 48 or 96 samples in steps of 7: the last is smaller, and halves are not equal.
    assert expt(*job(data, "one"), small=False)[0] == 0
    planned = data == "clips"  # of the other, tensors are smaller than what is never counted
    for strategy in strategies:
        workers = int(strategy == "ddp")  # which each process has to start for itself
        code, out, err = expt(
            *job(data, strategy, "trainer.devices=2", f"trainer.strategy={strategy}"),
            "memory.gradient_accumulation=2", f"memory.plan={planned}",
            f"loader.num_workers={workers}", small=False,
        )  # fmt: skip
        assert code == 0, err
        assert out.count("parameters, cpu") == 1, "only the first of them speaks"
        assert ("there is no recovery" in out) == (strategy == "fsdp")
        assert_the_same(home / strategy, home / "one")
        ranks = load_result(home / strategy).ranks
        assert [rank["rank"] for rank in ranks] == [0, 1]
        peaks = [rank["peak_allocated_bytes"] for rank in ranks]
        memory = load_result(home / strategy).memory
        assert memory["peak_allocated_bytes"] == max(peaks) > 0
        if planned:
            assert abs(memory["prediction_error"]) < 0.02
    assert not list(home.glob("expt-rank-*"))


@pytest.mark.parametrize(("count", "strategy"), [(3, "ddp"), (2, "fsdp")])
def test_more_processes_than_samples_in_the_last_step(expt, job, home, count, strategy) -> None:
    size = ("data.batch_size=95", "trainer.epochs=1")  # and one is left
    assert expt(*job("blobs", "one", *size), small=False)[0] == 0
    several = (f"trainer.devices={count}", f"trainer.strategy={strategy}")
    code, _, err = expt(*job("blobs", "several", *size, *several), small=False)
    assert code == 0, err
    assert_the_same(home / "several", home / "one")


@pytest.mark.parametrize(
    ("data", "fault", "phase"),
    [("clips", "forward@1:3,9", "forward"), ("blobs", "backward@0:5", "backward")],
)
def test_when_memory_runs_out_in_one_process_all_go_down_the_same_rung(
    expt, job, home, monkeypatch, data, fault, phase
) -> None:
    plain = ("optimizer=sgd", "optimizer.lr=0.02")  # which does not divide by small gradients
    assert expt(*job(data, "one", *plain), small=False)[0] == 0
    monkeypatch.setenv("LAB", fault)
    code, out, err = expt(*job(data, "two", *plain, "trainer.devices=2"), small=False)
    assert code == 0, err
    events = load_result(home / "two").oom_events
    assert [(event["phase"], event["rung"]) for event in events] == [
        (phase, "halve_micro_batch") for _ in fault.split(",")
    ]
    rank = int(fault.partition("@")[2][0])
    assert {event["rank"] for event in events} == {rank}
    assert f"on rank {rank}" in out
    assert_the_same(home / "two", home / "one")


def test_an_optimizer_that_breaks_off_in_one_process_sends_all_back(
    expt, job, home, monkeypatch
) -> None:
    own = ("optimizer=sgd", "optimizer._target_=failing.LackingSGD")
    assert expt(*job("blobs", "one", *own), small=False)[0] == 0
    monkeypatch.setenv("LAB", "step@1:4")
    code, out, err = expt(*job("blobs", "two", *own, "trainer.devices=2"), small=False)
    assert code == 0, err
    assert "back at step 2" in out
    (event,) = load_result(home / "two").oom_events
    assert (event["phase"], event["replayed"], event["rank"]) == ("optimizer_step", True, 1)
    assert_the_same(home / "two", home / "one")


def test_torchrun_and_a_signal(expt, job, home, monkeypatch) -> None:
    assert expt(*job("blobs", "one"), small=False)[0] == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    started = subprocess.run(
        [*torchrun, "-m", "expt", *(one for one in job("blobs", "two") if "run.dir" not in one)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    (run,) = (home / "outputs/runs").glob("*/*")  # the folder's name has the time in it
    assert_the_same(run, home / "one")


def test_a_signal_to_every_process_of_a_job_saves_and_ends_it(job, home: Path) -> None:
    """As a scheduler's: the starter passes it on to those that have had it, and workers read."""
    line = job("clips", "long", "trainer.devices=2", "trainer.epochs=100000")
    line = [*line, "loader.num_workers=1", "trainer.checkpoint_every_steps=1000000"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "expt", *line, "trainer.early_stopping_patience=null"],
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 90
    while not (home / "long/checkpoints/best.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    reached = read_progress(home / "long/checkpoints").step
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, (home / "log").read_text()
    result = load_result(home / "long")
    assert (result.stop_reason, result.steps > reached) == ("signal", True)
    assert read_progress(home / "long/checkpoints").step == result.steps
    deadline = time.monotonic() + 60  # the server that forked them ends a moment later
    while _running_in(home) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running_in(home), "no process is left"


def _running_in(folder: Path) -> list[str]:
    """Return the other processes whose current folder this is; ranks have no command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = (process / "cwd").readlink() == folder
        except OSError:
            continue
        if inside and process.name != str(os.getpid()):
            found.append((process / "cmdline").read_text())
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_killed_process_ends_all_and_the_run_goes_on_as_if_nothing_had_been(
    expt, job, home, monkeypatch, strategy
) -> None:
    two = ("trainer.devices=2", f"trainer.strategy={strategy}", "model.dropout=0.2")
    assert expt(*job("blobs", "whole", *two), small=False)[0] == 0
    monkeypatch.setenv("LAB", "kill@1:6")
    started = time.monotonic()
    code, _, err = expt(*job("blobs", "run", *two), small=False)
    assert time.monotonic() - started < 120
    assert code == 1
    assert err.count("error:") == 1
    assert "rank 1 died: it was killed (SIGKILL)" in err
    assert load_result(home / "run").stop_reason.startswith("RankError: rank 1 died")
    monkeypatch.setenv("LAB", "")
    again = ("trainer.resume=true",)
    code, out, err = expt(*job("blobs", "run", *two, *again), small=False)
    assert code == 0, err
    assert "at step 4" in out
    result, expected = load_result(home / "run"), load_result(home / "whole")
    assert result.weights_sha256 == expected.weights_sha256
    assert result.metrics == expected.metrics


def test_a_killed_first_process_leaves_a_run_that_failed_and_no_earlier_result(
    expt, job, home, monkeypatch
) -> None:
    from mlflow import MlflowClient

    line = job("blobs", "run", "trainer.devices=2")
    line = tuple(one.replace("tracking=none", "tracking=mlflow") for one in line)
    monkeypatch.setenv("LAB", "kill@0:6")
    code, _, err = expt(*line, small=False)
    assert code == 1 and "rank 0 died: it was killed (SIGKILL)" in err
    state = State.load(home / "run")
    client = MlflowClient(state.uri)
    assert client.get_run(state.run_id).info.status == "FAILED"
    monkeypatch.setenv("LAB", "kill@1:2")
    assert expt(*line, "trainer.resume=true", small=False)[0] == 1
    assert load_result(home / "run").stop_reason.startswith("RankError: rank 1 died")
    monkeypatch.setenv("LAB", "kill@0:2")
    assert expt(*line, "trainer.resume=true", small=False)[0] == 1
    assert load_result(home / "run").stop_reason.startswith("RankError: rank 0 died")
    assert client.get_run(state.run_id).info.status == "FAILED"


def test_a_run_of_two_goes_on_with_one_and_one_of_one_with_two(expt, job, home) -> None:
    sharded = ("trainer.devices=2", "trainer.strategy=fsdp")
    half, on = ("trainer.epochs=1", "trainer.schedule=constant"), ("trainer.resume=true",)
    whole = ("trainer.schedule=constant",)
    assert expt(*job("blobs", "same", *whole), small=False)[0] == 0
    assert expt(*job("blobs", "down", *half, *sharded), small=False)[0] == 0
    code, out, err = expt(*job("blobs", "down", *whole, *on), small=False)
    assert code == 0, err
    assert "written by 2 ranks, and 1 rank go on" in out
    assert_the_same(home / "down", home / "same")
    assert expt(*job("blobs", "up", *half), small=False)[0] == 0
    code, out, err = expt(*job("blobs", "up", *whole, *sharded, *on), small=False)
    assert code == 0, err
    assert_the_same(home / "up", home / "same")


def test_an_error_in_one_process_is_told_once(expt, job, home, monkeypatch) -> None:
    monkeypatch.setenv("LAB", "bug@1:3")
    code, _, err = expt(*job("blobs", "run", "trainer.devices=2"), small=False)
    assert code == 1
    assert err.count("Traceback") == 1
    assert "error: rank 1: ValueError: a bug in one process" in err
    monkeypatch.setenv("LAB", "forward@1:3")
    sharded = ("trainer.devices=2", "trainer.strategy=fsdp")
    code, _, err = expt(*job("blobs", "lacking", *sharded), small=False)
    assert code == 1
    assert "error: rank 1: OutOfMemoryError: CUDA out of memory" in err
    assert "Traceback" not in err
    result = load_result(home / "lacking")
    assert (result.status, result.stop_reason.startswith("RankError: rank 1")) == ("failed", True)
