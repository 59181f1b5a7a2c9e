"""Letters: `B` batch, `T` input steps, `N` sensors, `P` horizon."""

from __future__ import annotations

import torch

from expt.jobs.traffic.persistence import Persistence


def test_the_last_reading_is_repeated_and_a_missing_one_is_the_zero_it_is() -> None:
    speed = torch.arange(24.0).view(2, 4, 3)
    observed = torch.ones(2, 4, 3, dtype=torch.bool)
    observed[1, 3, 2] = False
    forecast = Persistence(horizon=5, missing_value=-3.5)(speed, observed)
    assert forecast.shape == (2, 5, 3)
    assert forecast.unique(dim=1).squeeze(1).tolist() == [[9.0, 10.0, 11.0], [21.0, 22.0, -3.5]]


def test_it_has_no_parameters_and_can_be_stepped_all_the_same() -> None:
    net = Persistence(horizon=2, missing_value=0.0)
    assert sum(parameter.numel() for parameter in net.parameters()) == 0
    optimizer = torch.optim.AdamW(net.parameters())
    speed = torch.randn(2, 4, 3)
    net(speed, speed > 0).sum().backward()
    optimizer.step()
    assert torch.equal(net(speed, speed > -9)[:, 0], speed[:, -1])
