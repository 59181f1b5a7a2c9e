"""Plans of a run with the feature cache, against the profiler: of training, and of making them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from expt.config.settings import Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.memory.techniques.techniques import apply
from expt.run.build import build, build_model, build_optimizer, techniques_of
from expt.run.feature_plans import FeaturePlans
from expt.run.features import check, reduce
from expt.run.planner import Planner, kept_on_device, plan_training
from expt.run.savings import savings
from expt.run.target import arithmetic
from expt.training.batches import Examples
from expt.training.device import make_fabric
from expt.training.features.feature import computed

SMALL = ("trainer.device=cpu", "data.pixels=64", "model.width=256")


@pytest.fixture
def given(toys, home) -> Callable[..., tuple[Settings, Any]]:
    """Compose settings of the toy job with a frozen part, and build its data."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from expt.config.compose import conf_dir, register

    register()
    GlobalHydra.instance().clear()

    def make(*overrides: str) -> tuple[Settings, Any]:
        with initialize_config_dir(str(conf_dir())):
            path = f"hydra.searchpath=[file://{toys / 'conf'}]"
            lines = [path, "data=pictures", "model=deep", *SMALL, *overrides]
            settings = validated(compose("config", overrides=lines))
        return settings, build(settings, "data")

    return make


def highest(work: Callable[[], object], live: Iterable[Any]) -> int:
    """Return the peak of some work, by torch.profiler's events, on what was there before."""
    from torch.profiler import ProfilerActivity, profile

    before = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for value in tree_iter(list(live))
        if isinstance(value, Tensor)
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return sum(before.values()) + max(itertools.accumulate(change for _, change in changes))


def measured(settings: Settings, data: Any, made: Any) -> tuple[int, int]:
    """Return the peaks of a real step on features, and of making a batch of them."""
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    mode, precision = settings.memory.cached_features, fabric.strategy.precision
    examples = Examples(data)
    model = build_model(settings, data, examples.input_names())
    model.eval()

    def making() -> object:
        batch = examples.batch("train", data.eval_batch_size)
        found = computed(model, mode, batch.inputs, precision)
        return {one.name: one.encode(found[one.name]) for one in made.features}

    building = highest(making, [*model.parameters(), *model.buffers()])
    check(settings, data, model)
    reduce(model, mode, made.features)
    apply(model, techniques_of(settings.memory))
    wrapped, optimizer = fabric.setup(model, build_optimizer(settings, model))
    wrapped.train()
    cached = Examples(made.data(data))

    def step() -> None:
        batch = cached.batch("train", data.batch_size)
        loss = data.loss(wrapped(**batch.inputs), batch) / data.batch_size
        fabric.backward(loss)
        nn.utils.clip_grad_norm_(wrapped.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = list(optimizer.state.values())
    training = highest(step, [*model.parameters(), *model.buffers(), state])
    return training, building


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory.feature_cache=prefix", "data.batch_size=32"),
        ("memory.feature_cache=prefix", "data.eval_batch_size=44", "memory.precision=bf16"),
        ("memory.feature_cache=prefix", "memory.feature_cache_dtype=fp16", "data.batch_size=32"),
        ("memory.feature_cache=vision", "model.frozen=0", "data.batch_size=32"),
        ("memory.feature_cache=prefix", "memory.activation_checkpointing=true"),
    ],
)
def test_training_and_making_are_predicted_within_one_percent(given, overrides) -> None:
    settings, data = given(*overrides)
    numbers = arithmetic(settings.memory.precision, "cpu")
    made = FeaturePlans().of(settings, data, "cpu", numbers, Examples(data), kept_on_device(data))
    training, building = measured(settings, data, made)
    assert made.planned.peak_bytes == pytest.approx(building, rel=0.01)
    alone = plan_training(settings, made.data(data), "cpu", evaluation=False)
    assert alone.peak_bytes == pytest.approx(training, rel=0.01)
    both = plan_training(settings, data, "cpu")
    assert both.peak_bytes == max(made.planned.peak_bytes, alone.peak_bytes)
    assert (both.phase == "feature_cache") == (made.planned.peak_bytes > alone.peak_bytes)


def test_the_frozen_part_is_not_there_and_the_disk_is_named(given) -> None:
    live = plan_training(*given("data.eval_batch_size=1", "model.frozen=3"), "cuda")
    settings, data = given(
        "data.eval_batch_size=1", "model.frozen=3", "memory.feature_cache=prefix"
    )
    cached = Planner(settings, data, "cuda", evaluation=False).plan()
    frozen = 4 * (65 * 256 + 1 + 3 * (2 * 256 + 257 * 512 + 513 * 256))
    assert live.by_category["parameters"] - cached.by_category["parameters"] == pytest.approx(
        frozen, rel=0.01
    )
    assert cached.peak_bytes < live.peak_bytes - frozen
    (note,) = [note for note in cached.notes if "on disk" in note]
    assert "68 samples of" in note and "making the features before it" in note


def test_a_plan_writes_and_reads_nothing(given, home) -> None:
    import features

    settings, data = given("memory.feature_cache=prefix")
    features.Pictures.reads = 0
    planner = Planner(settings, data, "cpu")
    planner.plan()
    savings(planner)
    assert features.Pictures.reads <= 2  # one for its shapes, one to evaluate on
    assert not (home / "outputs").exists()


def test_alternating_is_planned_as_a_live_epoch(given) -> None:
    live = plan_training(*given(), "cpu")
    alternating = plan_training(*given("memory.feature_cache=alternating"), "cpu")
    assert alternating.peak_bytes == live.peak_bytes
    assert any("44 samples of" in note for note in alternating.notes)


@pytest.mark.parametrize("line", ["model.modes=[vision]", "model.train_all=true"])
def test_a_plan_refuses_what_a_run_would(given, line: str) -> None:
    with pytest.raises(ConfigError, match=r"memory\.feature_cache=prefix"):
        plan_training(*given("memory.feature_cache=prefix", line), "cpu")
