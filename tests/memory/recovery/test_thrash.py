from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.errors import RecoveryError
from expt.memory.recovery.attempt import Failure, Shortage
from expt.memory.recovery.limits import EVERY_STEPS, LOOKS, Limits, Thrashing
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques


def verdicts(counts: list[int]) -> list[int]:
    """Return the looks, from 0, at which thrashing was found."""
    left = iter(counts)
    watch = Thrashing(lambda: next(left))
    found = [watch.after_step() for _ in range(EVERY_STEPS * len(counts))]
    return [index // EVERY_STEPS for index, verdict in enumerate(found) if verdict]


@pytest.mark.parametrize(
    ("counts", "looks"),
    [
        ([0] * 10, []),
        ([5] * 10, []),
        ([0, 1, 1, 2, 3, 3, 4, 5], []),
        ([0, 1, 2, 3, 4, 5, 6, 7], [LOOKS, 2 * LOOKS]),
        ([9, 9, 10, 12, 15], [4]),
    ],
)
def test_only_growth_look_after_look_counts(counts, looks):
    assert verdicts(counts) == looks


@pytest.fixture
def thrashing(monkeypatch) -> Recovery:
    retries = iter(range(10_000))
    statistics = lambda device: {"num_alloc_retries": next(retries)}  # noqa: E731
    monkeypatch.setattr(torch.cuda, "memory_stats", statistics)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    return Recovery(Techniques(), torch.device("cuda", 0))


def test_a_precaution_does_not_cut_a_batch_that_is_normalised_over(thrashing):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    thrashing.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(EVERY_STEPS * (LOOKS + 1)):
        thrashing.step(lambda _: None, None, 8)
    (event,) = thrashing.events
    assert (event["rung"], event["exact"]) == ("release", True)
    reasons = {one["rung"]: one["reason"] for one in event["skipped"]}
    assert "normalises over the batch" in reasons["halve_micro_batch"]


def test_a_thrashing_run_goes_one_rung_down_before_it_ends(thrashing):
    recovery, model = thrashing, nn.Linear(2, 2)
    recovery.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    taken = []
    for step in range(EVERY_STEPS * (LOOKS + 1)):
        recovery.position = (step, 0)
        recovery.step(lambda _: taken.append(recovery.techniques.gradient_accumulation), None, 8)
    (event,) = recovery.events
    assert (event["phase"], event["cause"]) == ("thrashing", "allocation_retries")
    assert event["rung"] == "halve_micro_batch"
    assert len(taken) == EVERY_STEPS * (LOOKS + 1), "no step was taken twice"
    assert recovery.techniques == Techniques(2)


def test_thrashing_has_a_limit_of_its_own_and_uses_up_no_other(thrashing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    recovery, model = thrashing, nn.Linear(2, 2)
    recovery.limits = Limits(per_run=2, thrashing=4)
    recovery.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(EVERY_STEPS * LOOKS * 7):
        recovery.position = (step, 0)
        recovery.step(lambda _: None, None, 8)
    assert [event["phase"] for event in recovery.events] == ["thrashing"] * 4
    failing = iter([True, False, True, False, True])

    def step(_: object) -> None:
        if next(failing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    for at in range(2):
        recovery.position = (10_000 + at, 0)
        recovery.step(step, None, 8)
    recovery.position = (10_002, 0)
    with pytest.raises(RecoveryError, match=r"memory\.max_recoveries=2"):
        recovery.step(step, None, 8)


def test_attempts_between_two_steps_are_counted_for_one_place():
    recovery = Recovery(Techniques(8), torch.device("cpu"))
    model = nn.Linear(2, 2)
    recovery.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    failure = Failure(Shortage("full", 1, 0))
    for step in range(6):
        recovery.position = (step, 0)
        recovery.between_steps(failure, 8)
    assert [event["rung"] for event in recovery.events] == ["release"] * 6
    recovery.position = (4, 0)  # back from a checkpoint, it fails again
    for _ in range(2):
        recovery.between_steps(failure, 8)
    with pytest.raises(RecoveryError, match="nothing is left"):
        recovery.between_steps(failure, 8)
