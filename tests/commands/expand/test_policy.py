"""Which steps are kept, on top of what, and what is run again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from expt.commands.expand.policy import (
    Probe,
    expand,
    kept_changes,
    last_values,
    stored_probe,
    verdict,
)
from expt.job import Metric
from expt.result import Outcome

MAE = Metric("mae", label="MAE")
GIB = 2**30
STEPS = ["model.num_stages=3", "data.batch_size=24", "data.batch_size=32"]


class Table:
    """Errors and peaks by settings; counts what is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.known: dict[object, Probe] = {
            (): Probe(Outcome.completed, 5.0, peak_allocated_bytes=1 * GIB),
            STEPS[0]: Probe(Outcome.completed, 4.5, peak_allocated_bytes=2 * GIB),
            STEPS[1]: Probe(Outcome.completed, 4.6, peak_allocated_bytes=3 * GIB),
            STEPS[2]: Probe(Outcome.completed, 4.0, peak_allocated_bytes=4 * GIB),
        }

    def __call__(self, number: int, changes: tuple[str, ...]) -> Probe:
        self.asked.append(changes)
        return self.known[changes[-1] if changes else ()]


def test_a_step_is_tried_on_top_of_what_was_kept() -> None:
    table = Table()
    steps = expand(STEPS, table, MAE, tolerance=0.01)
    assert table.asked == [
        (),
        (STEPS[0],),
        (STEPS[0], STEPS[1]),
        (STEPS[0], STEPS[2]),  # the step before was 2.2 % worse, and not kept
    ]
    assert [step.kept for step in steps] == [True, True, False, True]
    assert steps[2].reason == "the validation MAE is 2.2 % worse than the best"
    assert kept_changes(steps) == [STEPS[0], STEPS[2]]


def test_tolerance_lets_a_worse_step_pass_but_never_adds_up() -> None:
    table = Table()
    table.known[STEPS[2]] = Probe(Outcome.completed, 4.7, peak_allocated_bytes=GIB)
    steps = expand(STEPS, table, MAE, tolerance=0.03)
    assert [step.kept for step in steps] == [True, True, True, False], "4.7 is judged by 4.5"
    assert "2.2 % worse than the best, which is tolerated" in steps[2].reason
    assert kept_changes(steps) == STEPS[:2]


def test_the_last_value_of_a_key_is_what_is_kept() -> None:
    steps = expand(STEPS, Table(), MAE, tolerance=0.03)
    assert [step.kept for step in steps] == [True] * 4
    assert kept_changes(steps) == [STEPS[0], STEPS[2]]


def test_what_was_measured_over_the_budget_is_not_kept() -> None:
    steps = expand(STEPS, Table(), MAE, tolerance=1, budget_bytes=5 * GIB // 2)
    assert [step.kept for step in steps] == [True, True, False, False]
    assert steps[2].reason == "measured: 3.00 GiB is above the budget of 2.50 GiB"


def test_reserved_bytes_are_what_a_budget_limits() -> None:
    probe = Probe(Outcome.completed, 1.0, peak_allocated_bytes=GIB, peak_reserved_bytes=3 * GIB)
    assert verdict(probe, None, MAE, 0, 2 * GIB)[0] is False
    assert verdict(replace(probe, peak_reserved_bytes=None), None, MAE, 0, 2 * GIB)[0] is True


@pytest.mark.parametrize(
    "outcome", ["predicted_over", "out_of_memory", "refused", "failed", "timeout", "diverged"]
)
def test_what_goes_wrong_costs_that_step_only(outcome) -> None:
    table = Table()
    table.known[STEPS[0]] = Probe(Outcome(outcome), detail="because")
    steps = expand(STEPS, table, MAE, tolerance=0.01)
    assert [step.kept for step in steps] == [True, False, True, True]
    assert steps[1].reason == "because"
    assert table.asked[2] == (STEPS[1],)


def test_it_ends_where_the_starting_point_cannot_be_kept() -> None:
    table = Table()
    table.known[()] = Probe(Outcome.out_of_memory, detail="ran out of memory")
    steps = expand(STEPS, table, MAE, tolerance=0.01)
    assert len(steps) == 1
    assert not steps[0].kept
    assert kept_changes(steps) == []


def test_it_ends_where_a_probe_was_stopped_and_goes_on_there() -> None:
    table = Table()
    table.known[STEPS[1]] = Probe(Outcome.stopped)
    first = expand(STEPS, table, MAE, tolerance=0.01)
    assert [step.probe.outcome.value for step in first] == ["completed", "completed", "stopped"]
    stored = json.loads(json.dumps([step.as_dict() for step in first[:2]]))
    known = {tuple(one["changes"]): stored_probe(one) for one in stored}
    again = Table()
    steps = expand(STEPS, again, MAE, tolerance=0.01, known=known)
    assert again.asked == [(STEPS[0], STEPS[1]), (STEPS[0], STEPS[2])], "only what is left"
    assert [step.kept for step in steps] == [True, True, False, True]


def test_all_steps_are_told_after_each() -> None:
    told: list[int] = []
    expand(STEPS, Table(), MAE, tolerance=0.01, on_step=lambda steps: told.append(len(steps)))
    assert told == [1, 2, 3, 4]


def test_a_probe_without_an_error_is_not_kept() -> None:
    assert verdict(Probe(Outcome.completed), None, MAE, 0, None) == (
        False,
        "no validation MAE was measured",
    )


def test_an_error_may_be_negative_or_zero() -> None:
    def kept(error: float, best: float) -> bool:
        return verdict(Probe(Outcome.completed, error), best, MAE, 0.01, None)[0]

    assert kept(-5.0, -5.0) and kept(-5.1, -5.0) and kept(-4.96, -5.0)
    assert not kept(-4.9, -5.0)
    assert kept(0.0, 0.0) and not kept(0.1, 0.0)


def test_a_key_that_was_added_is_added_with_its_last_value() -> None:
    lines = ["+memory=lite", "+model.width=8", "model.width=16", "++a.b=1", "a.b=2", "c=1", "c=2"]
    assert last_values(lines) == ["+memory=lite", "+model.width=16", "++a.b=2", "c=2"]


def test_a_step_of_a_metric_that_is_to_be_high_is_kept_if_it_is_higher() -> None:
    accuracy = Metric("accuracy", goal="max", label="accuracy")
    table = Table()
    for change, value in {(): 0.312, STEPS[0]: 0.562, STEPS[1]: 0.25, STEPS[2]: 0.56}.items():
        table.known[change] = Probe(Outcome.completed, value, peak_allocated_bytes=GIB)
    steps = expand(STEPS, table, accuracy, tolerance=0.01)
    assert [step.kept for step in steps] == [True, True, False, True]
    assert steps[1].reason == "fits; 80.1 % better"
    assert steps[2].reason == "the validation accuracy is 55.5 % worse than the best"
    assert steps[3].reason == "fits; 0.4 % worse than the best, which is tolerated"


def test_a_step_of_an_earlier_version_is_read() -> None:
    step = {**Probe(Outcome.failed).__dict__, "outcome": "over_budget", "error": 3.5}
    del step["value"]
    probe = stored_probe(step)
    assert (probe.outcome, probe.value) == (Outcome.over_budget, 3.5)
