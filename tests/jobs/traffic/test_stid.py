"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expt.jobs.traffic.stid import STID

B, T, N, P, DAY = 3, 12, 29, 12, 288
ARGUMENTS: dict[str, Any] = {
    "num_sensors": N,
    "input_steps": T,
    "horizon": P,
    "steps_per_day": DAY,
    "missing_value": -3.67,
    "embed_dim": 32,
    "num_layers": 3,
    "dropout": 0.15,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**changes: Any) -> STID:
    torch.manual_seed(0)
    return STID(**{**ARGUMENTS, **changes}).eval()


def window() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "speed": torch.randn(B, T, N, generator=generator),
        "observed": torch.rand(B, T, N, generator=generator) > 0.1,
        "time_of_day": torch.arange(T) + torch.tensor([[0], [90], [270]]),
        "day_of_week": torch.tensor([[0], [3], [6]]).expand(B, T),
    }


def test_it_has_the_parameters_of_the_published_code() -> None:
    width = 4 * 32
    expected = {
        "sensor": 29 * 32,
        "time_of_day": 288 * 32,
        "day_of_week": 7 * 32,
        "window": (12 * 3 + 1) * 32,
        "layers": 3 * 2 * (width + 1) * width,
        "head": (width + 1) * 12,
    }
    found = dict.fromkeys(expected, 0)
    for name, parameter in model().named_parameters():
        found[name.partition(".")[0]] += parameter.numel()
    assert found == expected
    assert sum(found.values()) == 112_172


def test_the_forecast_has_a_value_per_window_step_and_sensor() -> None:
    assert model(horizon=6)(**window()).shape == (B, 6, N)


def test_every_parameter_gets_a_gradient_from_the_last_input_step() -> None:
    net, inputs = model(), window()
    net(**inputs).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    for name in ("time_of_day", "day_of_week"):
        used = getattr(net, name).grad.any(dim=1).nonzero().flatten()
        assert used.tolist() == sorted(inputs[name][:, -1].tolist())


def test_the_forecast_is_not_flat() -> None:
    assert (model()(**window()).diff(dim=1).abs() > 1e-6).all()


def test_neither_windows_nor_sensors_mix() -> None:
    net, inputs, order = model(), window(), torch.tensor([2, 0, 1])
    forecast = net(**inputs)
    permuted = {name: value[order] for name, value in inputs.items()}
    torch.testing.assert_close(net(**permuted), forecast[order], atol=1e-5, rtol=1e-5)
    inputs["speed"][0, :, 4] += 1
    inputs["observed"][0, 5, 4] = True  # at least one reading that counts
    difference = (net(**inputs) - forecast).abs().amax(dim=1)  # [B, N]
    assert difference.nonzero().tolist() == [[0, 4]]


def test_a_missing_reading_enters_as_the_zero_it_is_stored_as() -> None:
    net, inputs = model(), window()
    inputs["speed"][0, 4, 2] = 0.0
    flags = [inputs["observed"].clone() for _ in range(2)]
    flags[0][0, 4, 2], flags[1][0, 4, 2] = True, False
    observed, missing = (net(**{**inputs, "observed": flag}) for flag in flags)
    assert (observed[0] - missing[0]).abs().max() > 1e-4
    stored = inputs["speed"].clone()
    stored[0, 4, 2] = ARGUMENTS["missing_value"]
    torch.testing.assert_close(net(**{**inputs, "speed": stored, "observed": flags[0]}), missing)


@pytest.mark.parametrize("name", ["time_of_day", "day_of_week"])
def test_the_time_counts(name: str) -> None:
    net, inputs = model(), window()
    later = {**inputs, name: (inputs[name] + 1) % 7}
    assert (net(**later) - net(**inputs)).abs().max() > 1e-4
