from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from expt.commands.expand.probe import forced
from expt.commands.expand.steps import among, step_problems, without_effect, without_settings
from expt.config.command_nodes import ExpandConfig

BASE = ["+memory=minimal"]
FORCED = forced(ExpandConfig())


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("model.num_stagess=3", "there is no 'num_stagess'; did you mean 'num_stages'"),
        ("modle.num_stages=3", "there is no 'modle'; did you mean 'model'"),
        ("model.num_stages=three", "expected int, got str"),
        ("model.embed_dim=50", "embed_dim"),
        ("num_stages", "a step is one setting"),
        ("trainer.epochs=4", "trainer.epochs is the same for every probe"),
        ("trainer.steps_per_epoch=4", "trainer.steps_per_epoch is the same for every probe"),
        ("memory.recover=true", "memory.recover is the same for every probe"),
        ("memory.on_overflow=adapt", "memory.on_overflow is the same for every probe"),
        ("memory.fallback=preset", "memory.fallback is the same for every probe"),
        ("trainer.test=true", "trainer.test is the same for every probe"),
        ("memory.budget=40GiB", "memory.budget is the same for all steps"),
        ("memory=full", "give it as the starting point (+memory=full)"),
        ("+memory=full", "give it as the starting point (+memory=full)"),
        ("search=debug", "is not part of what is trained"),
        ("search.n_trials=3", "is not part of what is trained"),
        ("tracking.uri=x", "is not part of what is trained"),
        ("task=plan", "is not part of what is trained"),
        ("trainer.monitor=rmse", "is not part of what is trained"),
        ("optimizer=nothing", "nothing"),
        ("trainer={max_steps: 5}", "a dictionary is several settings at once"),
        ("model={num_stages: 3}", "give each as a step, like model.NAME=VALUE"),
        ("+model={num_stages: 3}", "a dictionary is several settings at once"),
        ("experiment=probe", "experiment=… is many settings at once"),
        ("data=metr_la", "data=… is many settings at once"),
        ("debug=overfit", "debug=… is many settings at once"),
        ("model.embed_dim=48,64", ""),
    ],
)
def test_a_step_that_cannot_be(composed, step, words) -> None:
    composed()
    (problem,) = step_problems(BASE, ["data.batch_size=4", step], FORCED)
    assert problem.startswith(f"expand.steps: {step}: ")
    assert words in problem
    assert "\n" not in problem


def test_steps_that_can_be(composed) -> None:
    cfg = composed("task=expand")
    assert len(cfg.expand.steps) == 6
    shipped = step_problems(["+memory=lite"], cfg.expand.steps, FORCED)
    assert shipped == [], "the list that is shipped"


def test_steps_that_change_nothing_are_found(composed) -> None:
    composed()
    base = ["experiment=vla", "+memory=full"]
    steps = ["model.rank=32", "model.live_layers=4", "model.live_layers=6", "model.nothing=1"]
    assert without_effect(base, steps) == ["model.rank=32"]


@pytest.mark.parametrize("name", ["vla", "vla_qwen"])
@pytest.mark.parametrize("preset", ["full", "lite", "minimal"])
def test_shipped_steps_of_a_vision_language_action_model_grow_it(composed, name, preset) -> None:
    base = [f"experiment={name}", f"+memory={preset}"]
    steps = composed("task=expand", *base).expand.steps
    assert steps
    for step in steps:
        option, _, value = step.partition("=")
        assert int(value) >= OmegaConf.select(composed(*base), option), step
    assert step_problems([*base, "data.path=FOLDER"], steps, FORCED) == []


def test_of_another_model_the_shipped_steps_that_it_does_not_have_are_found(composed) -> None:
    steps = composed("task=expand").expand.steps
    assert without_settings(["+memory=lite"], steps) == {}
    missing = without_settings(["model=stid"], [*steps, "+model.anything=1"])
    assert list(missing) == [
        "model.num_stages=3",
        "model.patch_sizes=[1,2,4]",
        "model.cross_stage_attention=true",
    ]
    assert "there is no 'num_stages'" in missing["model.num_stages=3"]


def test_a_step_may_need_what_comes_before_it(composed) -> None:
    composed()
    steps = ["model.embed_dim=60", "model.num_heads=5"]  # 48 is not divisible by 5
    assert step_problems(BASE, steps, FORCED) == []
    assert len(step_problems(BASE, steps[1:], FORCED)) == 1


def test_all_problems_are_told_at_once(composed) -> None:
    composed()
    assert len(step_problems(BASE, ["a.b=1", "model.depth=2"], FORCED)) == 2
    assert "expand.steps is empty" in step_problems(BASE, [], FORCED)[0]


def test_the_length_is_a_step_where_probes_have_none_of_their_own(composed) -> None:
    composed()
    whole = forced(ExpandConfig(probe_epochs=None, probe_steps=300))
    assert step_problems(BASE, ["trainer.epochs=4"], whole) == []
    (problem,) = step_problems(BASE, ["trainer.epochs=0"], whole)
    assert "trainer.epochs must be at least 1" in problem
    assert len(step_problems(BASE, ["trainer.steps_per_epoch=4"], whole)) == 1


def test_keys_and_beginnings_of_keys() -> None:
    assert among("expand.steps", ("expand",)) and among("task", ("task",))
    assert not among("expanded", ("expand",))


def test_another_model_or_optimizer_is_one_step(composed) -> None:
    composed()
    steps = ["optimizer=adafactor", "model.patch_sizes=[1]"]
    assert step_problems(BASE, steps, FORCED) == []
