"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expt.errors import ConfigError
from expt.jobs.traffic.alternating import Alternating, Stage, hide_readings

B, T, N, P, DAY = 3, 12, 5, 12, 288
SHAPES = {"num_sensors": N, "input_steps": T, "horizon": P, "steps_per_day": DAY}
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "num_heads": 4,
    "num_layers": 1,
    "num_stages": 3,
    "patch_sizes": [1, 2, 4],
    "cross_stage_attention": True,
    "ffn_ratio": 2,
    "dropout": 0.1,
    "sensor_dropout": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {  # guide A's table
    "full": {
        "embed_dim": 96,
        "num_heads": 4,
        "num_layers": 2,
        "num_stages": 3,
        "patch_sizes": [1, 2, 4],
        "cross_stage_attention": True,
    },
    "lite": {
        "embed_dim": 64,
        "num_heads": 4,
        "num_layers": 1,
        "num_stages": 2,
        "patch_sizes": [1, 2],
        "cross_stage_attention": False,
    },
    "minimal": {
        "embed_dim": 48,
        "num_heads": 4,
        "num_layers": 1,
        "num_stages": 2,
        "patch_sizes": [1],
        "cross_stage_attention": False,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0, **changes: Any) -> Alternating:
    torch.manual_seed(seed)
    return Alternating(**{**SHAPES, **SMALL, **changes}).eval()


def window(batch: int = B, sensors: int = N, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, DAY - T, (batch, 1), generator=generator)
    return {
        "speed": torch.randn(batch, T, sensors, generator=generator),
        "observed": torch.rand(batch, T, sensors, generator=generator) > 0.1,
        "time_of_day": first + torch.arange(T),
        "day_of_week": torch.randint(0, 7, (batch, 1), generator=generator).expand(batch, T),
    }


@pytest.mark.parametrize("horizon", [1, 6, 12])
@pytest.mark.parametrize("patch_sizes", [[1], [12], [1, 2, 4], [3, 6]])
def test_the_forecast_has_a_value_per_window_step_and_sensor(
    horizon: int, patch_sizes: list[int]
) -> None:
    forecast = model(horizon=horizon, patch_sizes=patch_sizes)(**window())
    assert forecast.shape == (B, horizon, N)


def test_a_window_of_another_length_than_the_horizon() -> None:
    inputs = {name: value[:, :6] for name, value in window().items()}
    assert model(input_steps=6, patch_sizes=[1, 3])(**inputs).shape == (B, P, N)


def test_every_parameter_gets_a_gradient() -> None:
    net = model()
    net(**window()).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_the_gradient_reaches_every_reading() -> None:
    inputs = window()
    inputs["speed"].requires_grad_()
    model()(**inputs).square().sum().backward()
    assert inputs["speed"].grad is not None
    assert (inputs["speed"].grad != 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_forecast_is_not_flat(seed: int) -> None:
    forecast = model(seed)(**window())
    assert (forecast.diff(dim=1).abs() > 1e-6).all()


def test_every_forecast_step_has_weights_of_its_own() -> None:
    # Whatever the initial values: a query repeated over time would share them.
    net = model()
    forecast = net(**window())
    for step in range(P):
        (gradient,) = torch.autograd.grad(
            forecast[:, step].sum(), net.head.weight, retain_graph=True
        )
        assert gradient.any(dim=1).nonzero().flatten().tolist() == [step]


def test_windows_do_not_mix() -> None:
    net, inputs, order = model(), window(), torch.tensor([2, 0, 1])
    permuted = {name: value[order] for name, value in inputs.items()}
    torch.testing.assert_close(net(**permuted), net(**inputs)[order], atol=1e-5, rtol=1e-5)
    alone = {name: value[1:2] for name, value in inputs.items()}
    torch.testing.assert_close(net(**alone), net(**inputs)[1:2], atol=1e-5, rtol=1e-5)


def test_sensors_see_each_other() -> None:
    net, inputs = model(), window()
    changed = inputs["speed"].clone()
    changed[:, :, 0] += 1
    difference = net(**{**inputs, "speed": changed}) - net(**inputs)
    assert (difference[:, :, 1:].abs().amax(dim=1) > 1e-6).all()


def test_a_missing_reading_is_not_an_observed_mean() -> None:
    net, inputs = model(), window()
    inputs["speed"][0, 4, 2] = 0.0  # the mean, normalised
    flags = [inputs["observed"].clone() for _ in range(2)]
    flags[0][0, 4, 2], flags[1][0, 4, 2] = True, False
    observed, missing = (net(**{**inputs, "observed": flag}) for flag in flags)
    assert (observed[0] - missing[0]).abs().max() > 1e-4
    torch.testing.assert_close(observed[1:], missing[1:])


@pytest.mark.parametrize("name", ["time_of_day", "day_of_week"])
def test_the_time_counts(name: str) -> None:
    net, inputs = model(), window()
    later = {**inputs, name: (inputs[name] + 1) % 7}
    assert (net(**later) - net(**inputs)).abs().max() > 1e-4


def test_cross_stage_attention_exists_only_when_on_and_after_the_first_stage() -> None:
    looks = [stage.look_back is not None for stage in model().stages]
    assert looks == [False, True, True]
    without = model(cross_stage_attention=False)
    assert [stage.look_back for stage in without.stages] == [None, None, None]
    assert not any("look_back" in name for name in without.state_dict())


@pytest.mark.parametrize("on", [True, False])
def test_a_stage_depends_on_earlier_stages_only_by_cross_stage_attention(on: bool) -> None:
    torch.manual_seed(0)
    layer = {"embed_dim": 16, "num_heads": 4, "ffn_ratio": 2, "dropout": 0.0}
    stage = Stage([1, 2], 1, on, layer)
    tokens, earlier = torch.randn(B, T, N, 16), [torch.randn(B, T, N, 16) for _ in range(2)]
    before = stage(tokens, earlier)
    for position in range(2):
        changed = [e + (index == position) for index, e in enumerate(earlier)]
        # A constant added to all of a memory moves the values, not the weights' pattern alone.
        assert torch.equal(stage(tokens, changed), before) is not on


def test_a_later_stage_is_handed_every_earlier_output() -> None:
    net = model()
    seen: list[tuple[list[Tensor], Tensor]] = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, inputs, output: seen.append((inputs[1][:], output)))
    net(**window())
    outputs = [output for _, output in seen]
    for index, (earlier, _) in enumerate(seen):
        assert len(earlier) == index
        assert all(a is b for a, b in zip(earlier, outputs[:index], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 18}, "model.embed_dim=18 is not divisible by model.num_heads=4; try 16 or"),
        ({"embed_dim": 2}, "model.embed_dim=2 is not divisible by model.num_heads=4; try 4 or 4"),
        (
            {"patch_sizes": [1, 5]},
            "model.patch_sizes has 5, which does not divide the window of data.input_steps=12; "
            "allowed: [1, 2, 3, 4, 6, 12]",
        ),
        ({"patch_sizes": [0]}, "model.patch_sizes has 0,"),
        ({"patch_sizes": []}, "model.patch_sizes is empty; give at least [1]"),
        ({"num_stages": 0}, "model.num_stages must be at least 1, got 0"),
        ({"num_layers": -1}, "model.num_layers must be at least 1, got -1"),
        ({"dropout": 1.0}, "model.dropout must be in [0, 1), got 1.0"),
    ],
)
def test_an_impossible_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(**changes)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(message)
    assert Alternating.problems({**SMALL, **changes, "input_steps": T}) == caught.value.problems


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        model(embed_dim=18, patch_sizes=[5, 7], dropout=-0.1)
    assert len(caught.value.problems) == 4


def test_what_is_not_known_yet_is_not_judged() -> None:
    assert Alternating.problems({}) == []
    assert Alternating.problems({"patch_sizes": [5], "embed_dim": 18}) == []
    assert Alternating.problems({**SHAPES, **SMALL}) == []


def expected_parameters(
    sensors: int,
    embed_dim: int,
    num_layers: int,
    num_stages: int,
    patch_sizes: list[int],
    cross_stage_attention: bool,
    ffn_ratio: int,
    **_: Any,
) -> int:
    """Count by hand: linear maps with biases, norms of two vectors, tables."""
    width = embed_dim
    attention = 4 * width * (width + 1)
    norm = 2 * width
    feed_forward = 2 * ffn_ratio * width * width + (ffn_ratio + 1) * width
    layer = attention + feed_forward + 2 * norm
    patching = sum(2 * size * width**2 + (1 + size) * width for size in patch_sizes if size > 1)
    stage = len(patch_sizes) * num_layers * 2 * layer + patching
    looks = (num_stages - 1) * (attention + norm) if cross_stage_attention else 0
    embedding = 3 * width + (DAY + 7) * width + T * sensors * width
    head = (T * width + 1) * P
    return embedding + num_stages * stage + looks + head


@pytest.mark.parametrize("sensors", [29, 207])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_have_the_sizes_of_the_guide(preset: str, sensors: int) -> None:
    net = Alternating(**{**SHAPES, **SMALL, **PRESETS[preset], "num_sensors": sensors})
    row = PRESETS[preset]
    assert len(net.stages) == row["num_stages"]
    for stage in net.stages:
        assert [scale.patch_size for scale in stage.scales] == row["patch_sizes"]
        for scale in stage.scales:
            assert len(scale.temporal) == len(scale.spatial) == row["num_layers"]
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == expected_parameters(sensors, **{**SMALL, **row})


def test_the_presets_grow() -> None:
    counts = [expected_parameters(207, **{**SMALL, **PRESETS[preset]}) for preset in PRESETS]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)


def test_hidden_readings_are_stretches_of_some_sensors():
    torch.manual_seed(0)
    speed = torch.randn(64, 12, 29) + 5.0
    observed = torch.ones(64, 12, 29, dtype=torch.bool)
    observed[:, 3] = False
    hidden_speed, kept = hide_readings(torch.where(observed, speed, 0.0), observed, 0.25)
    assert not kept[:, 3].any()  # what was missing stays so
    assert (hidden_speed[~kept] == 0).all()
    assert torch.equal(hidden_speed[kept], speed[kept])
    hidden = (~kept).clone()
    hidden[:, 3] = hidden[:, 2] & hidden[:, 4]
    touched = hidden.any(dim=1)
    assert 0.2 < touched.float().mean() < 0.3
    starts = hidden.int().diff(dim=1, prepend=torch.zeros(64, 1, 29, dtype=torch.int)) == 1
    assert starts.sum(dim=1).max() == 1  # one stretch each
    lengths = hidden.sum(dim=1)[touched]
    assert lengths.min() <= 2
    assert lengths.max() >= 11


def test_readings_are_hidden_in_training_only():
    model = Alternating(**SHAPES, **{**SMALL, "dropout": 0.0, "sensor_dropout": 0.9})
    speed = torch.randn(B, T, N)
    steps = torch.zeros(B, T, dtype=torch.int64)
    inputs = (speed, torch.ones(B, T, N, dtype=torch.bool), steps, steps)
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))
