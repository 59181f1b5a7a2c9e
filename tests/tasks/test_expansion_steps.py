from __future__ import annotations

import pytest

from expt.tasks.expansion_steps import among, step_problems

BASE = ["+memory=minimal"]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("model.num_stagess=3", "there is no 'num_stagess'; did you mean 'num_stages'"),
        ("modle.num_stages=3", "there is no 'modle'; did you mean 'model'"),
        ("model.num_stages=three", "expected int, got str"),
        ("model.embed_dim=50", "embed_dim"),
        ("num_stages", "a step is one setting"),
        ("trainer.epochs=0", "trainer.epochs must be at least 1"),
        ("tracking.uri=x", "is not part of what is trained"),
        ("task=plan", "is not part of what is trained"),
        ("optimizer=nothing", "nothing"),
        ("model.embed_dim=48,64", ""),
    ],
)
def test_a_step_that_cannot_be(composed, step, words) -> None:
    composed()
    (problem,) = step_problems(BASE, ["data.batch_size=4", step])
    assert problem.startswith(f"expand.steps: {step}: ")
    assert words in problem
    assert "\n" not in problem


def test_steps_that_can_be(composed) -> None:
    cfg = composed("task=expand")
    assert len(cfg.expand.steps) == 6
    assert step_problems(["+memory=lite"], cfg.expand.steps) == [], "the list that is shipped"


def test_a_step_may_need_what_comes_before_it(composed) -> None:
    composed()
    steps = ["model.embed_dim=60", "model.num_heads=5"]  # 48 is not divisible by 5
    assert step_problems(BASE, steps) == []
    assert len(step_problems(BASE, steps[1:])) == 1


def test_all_problems_are_told_at_once(composed) -> None:
    composed()
    assert len(step_problems(BASE, ["a.b=1", "model.depth=2"])) == 2
    assert "expand.steps is empty" in step_problems(BASE, [])[0]


def test_keys_and_beginnings_of_keys() -> None:
    assert among("expand.steps", ("expand",)) and among("task", ("task",))
    assert not among("expanded", ("expand",))
