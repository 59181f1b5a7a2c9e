"""What holds for every model. A new model is added to `TRAINED`; a test fails until it is.

What has no weights to train is in `FIXED`, and held to what does not need any.

Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expt.jobs
from expt.jobs.traffic.alternating import Alternating
from expt.jobs.traffic.dlinear import DLinear
from expt.jobs.traffic.graph_wavenet import GraphWaveNet
from expt.jobs.traffic.historical_average import HistoricalAverage
from expt.jobs.traffic.persistence import Persistence
from expt.jobs.traffic.phase1 import Phase1
from expt.jobs.traffic.staeformer import STAEformer
from expt.jobs.traffic.stid import STID

B, T, N, P, DAY = 8, 12, 4, 12, 288
SHAPES: dict[str, Any] = {
    "num_sensors": N,
    "input_steps": T,
    "horizon": P,
    "steps_per_day": DAY,
}
SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "ffn_ratio": 2, "dropout": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alternating(
    num_layers: int, num_stages: int, patch_sizes: list[int], look: bool
) -> Callable[[], nn.Module]:
    return partial(
        Alternating,
        **SHAPES,
        **SMALL,
        num_layers=num_layers,
        num_stages=num_stages,
        patch_sizes=patch_sizes,
        cross_stage_attention=look,
        sensor_dropout=0.0,
    )


def graph_wavenet(adjacency: Tensor | None) -> Callable[[], nn.Module]:
    return partial(
        GraphWaveNet,
        num_sensors=N,
        horizon=P,
        steps_per_day=DAY,
        missing_value=MISSING,
        adjacency=adjacency,
        channels=16,
        skip_channels=32,
        end_channels=32,
        dilations=[1, 2, 1, 2],
        kernel_size=3,
        diffusion_steps=2,
        node_embed_dim=4,
        dropout=0.1,
    )


MISSING = -3.67
TRAINED: dict[str, Callable[[], nn.Module]] = {
    "alternating-full": alternating(2, 3, [1, 2, 4], True),
    "alternating-lite": alternating(1, 2, [1, 2], False),
    "alternating-minimal": alternating(1, 2, [1], False),
    "phase1": partial(Phase1, **SHAPES, **SMALL),
    "stid": partial(STID, **SHAPES, missing_value=MISSING, embed_dim=8, num_layers=2, dropout=0.1),
    "staeformer": partial(
        STAEformer,
        **SHAPES,
        missing_value=MISSING,
        input_embed_dim=4,
        time_embed_dim=4,
        day_embed_dim=4,
        adaptive_embed_dim=12,
        feed_forward_dim=32,
        num_heads=4,
        num_layers=2,
        dropout=0.1,
    ),
    "graph_wavenet": graph_wavenet(torch.rand(N, N, generator=torch.Generator().manual_seed(0))),
    "graph_wavenet-no-graph": graph_wavenet(None),
    # Missing ones as the mean: far outliers would hide the lines that these windows are.
    "dlinear": partial(DLinear, input_steps=T, horizon=P, missing_value=0.0, moving_average=5),
}
FIXED: dict[str, Callable[[], nn.Module]] = {
    "persistence": partial(Persistence, horizon=P, missing_value=MISSING),
    "historical_average": partial(HistoricalAverage, N, P, DAY),
}
MODELS = {**TRAINED, **FIXED}

every_model = pytest.mark.parametrize("name", MODELS)
every_trained_model = pytest.mark.parametrize("name", TRAINED)


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs and a target [B,P,N] that goes on where each sensor's window ended, sloping."""
    generator = torch.Generator().manual_seed(1)
    level = torch.randn(B, 1, N, generator=generator)
    slope = torch.randn(B, 1, N, generator=generator) / T
    steps = torch.arange(T + P).view(1, -1, 1)
    course = level + slope * steps
    first = torch.randint(0, DAY - T, (B, 1), generator=generator)
    inputs = {
        "speed": course[:, :T],
        "observed": torch.rand(B, T, N, generator=generator) > 0.1,
        "time_of_day": first + torch.arange(T),
        "day_of_week": torch.randint(0, 7, (B, 1), generator=generator).expand(B, T),
    }
    return inputs, course[:, T:]


def train(model: nn.Module, steps: int = 30) -> list[float]:
    inputs, target = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = (model(**inputs) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@every_trained_model
def test_thirty_steps_lower_the_loss(name: str) -> None:
    losses = train(build(name))
    assert sum(losses[-3:]) / 3 < 0.6 * losses[0]


@every_model
def test_the_forecast_is_finite_and_of_the_right_shape(name: str) -> None:
    forecast = build(name)(**batch()[0])
    assert forecast.shape == (B, P, N)
    assert forecast.dtype == torch.float32
    assert forecast.isfinite().all()


@every_model
def test_a_batch_of_one(name: str) -> None:
    inputs = {key: value[:1] for key, value in batch()[0].items()}
    assert build(name)(**inputs).shape == (1, P, N)


@every_trained_model
def test_evaluation_is_deterministic_and_training_is_not(name: str) -> None:
    model, (inputs, _) = build(name), batch()
    draws = any(isinstance(part, nn.Dropout) for part in model.modules())
    assert torch.equal(model(**inputs), model(**inputs)) != draws
    model.eval()
    assert torch.equal(model(**inputs), model(**inputs))


@every_model
def test_the_inputs_are_left_as_they_were(name: str) -> None:
    model, (inputs, _) = build(name), batch()
    before = copy.deepcopy(inputs)
    model(**inputs).sum().backward()
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)


@every_trained_model
def test_the_state_makes_another_model_the_same(name: str) -> None:
    trained, fresh, (inputs, _) = build(name), build(name, seed=1), batch()
    train(trained, steps=2)
    trained.eval()
    fresh.eval()
    assert not torch.equal(fresh(**inputs), trained(**inputs))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(**inputs), trained(**inputs))


@every_trained_model
def test_the_seed_decides_the_weights(name: str) -> None:
    one, same, other = build(name), build(name), build(name, seed=1)
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@every_trained_model
def test_it_trains_under_bf16_autocast(name: str) -> None:
    model, (inputs, target) = build(name).eval(), batch()
    exact = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**inputs)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)
    (rounded.float() - target).abs().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), key


def test_every_model_of_the_package_is_here() -> None:
    covered = {factory.func for factory in MODELS.values()}  # type: ignore[attr-defined]
    for info in pkgutil.walk_packages(expt.jobs.__path__, "expt.jobs."):
        module = importlib.import_module(info.name)
        for _, found in inspect.getmembers(module, inspect.isclass):
            if found.__module__ != info.name or not issubclass(found, nn.Module):
                continue
            asked = inspect.signature(found).parameters
            if "horizon" in asked:  # a forecaster, not a part of one
                assert found in covered, f"add {found.__name__} to TRAINED of this file"
