from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from expt.config.schema import Schedule
from expt.training.schedules import END_FACTOR, START_FACTOR, factor

WARMUP = 0.1


def curve(name: str, warmup: float = WARMUP, count: int = 1000) -> list[float]:
    rate = factor(name, warmup, [0.5, 0.8], 0.1)
    return [rate(step / count) for step in range(count + 1)]


@pytest.mark.parametrize("schedule", Schedule)
def test_every_schedule_of_the_schema_exists_and_stays_in_range(schedule: Schedule) -> None:
    assert all(0 < value <= 1 for value in curve(schedule.value))


def test_constant() -> None:
    assert set(curve("constant")) == {1.0}


def test_steps_fall_at_the_milestones_and_not_before() -> None:
    rate = factor("step", 0.0, [0.5, 0.8], 0.1)
    assert [rate(at) for at in (0, 0.4999, 0.5, 0.7999, 0.8, 1)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_up_to_the_peak_then_down(name: str) -> None:
    values = curve(name)
    assert values[0] == pytest.approx(START_FACTOR)
    assert values[100] == max(values) == pytest.approx(1)
    assert values[-1] == pytest.approx(END_FACTOR)
    assert values[:101] == sorted(values[:101])
    assert values[100:] == sorted(values[100:], reverse=True)
    # No jump anywhere, and none where the halves meet.
    assert max(abs(b - a) for a, b in pairwise(values)) < 0.02


def test_the_warm_up_is_straight_for_cosine_and_curved_for_one_cycle() -> None:
    halfway, quarter = WARMUP / 2, WARMUP / 4
    middle = (1 + START_FACTOR) / 2
    linear, curved = factor("cosine", WARMUP, [], 1), factor("one_cycle", WARMUP, [], 1)
    assert [linear(halfway), curved(halfway)] == pytest.approx([middle, middle])
    assert linear(quarter) == pytest.approx(START_FACTOR + (1 - START_FACTOR) / 4)
    assert curved(quarter) < linear(quarter) - 0.05


def test_both_anneal_by_half_a_cosine() -> None:
    for name in ("cosine", "one_cycle"):
        rate = factor(name, 0.2, [], 1)
        assert rate(0.6) == pytest.approx((1 + END_FACTOR) / 2)


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_without_a_warm_up_the_peak_comes_first(name: str) -> None:
    assert curve(name, warmup=0.0)[0] == 1.0


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_it_does_not_rise_again_after_the_end(name: str) -> None:
    assert factor(name, WARMUP, [], 1)(1.5) == pytest.approx(END_FACTOR)


def test_one_cycle_is_torchs_own() -> None:
    steps = 200
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=steps + 1,
        pct_start=(20 + 1) / (steps + 1),  # torch counts to the step before
        div_factor=1 / START_FACTOR,
        final_div_factor=START_FACTOR / END_FACTOR,
    )
    ours = factor("one_cycle", 20 / steps, [], 1)
    for step in range(steps):
        assert theirs.get_last_lr()[0] == pytest.approx(ours(step / steps), abs=1e-9)
        optimizer.step()
        theirs.step()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        factor("linear", WARMUP, [], 1)
