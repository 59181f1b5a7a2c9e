from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expt.config.schema import MemoryConfig
from expt.memory.planning.plan import Plan
from expt.run.guard import expected_bytes, manager_for

HOST = Plan("cpu", 50, None, (40, 70), "forward", {"inputs": 50}, {}, {}, "trace", 0.0)
CARD = replace(HOST, target="cuda", reserved_bytes=60, reserved_interval_bytes=(55, 80))


@pytest.mark.parametrize(
    ("planned", "budget", "expected"),
    [
        (HOST, 100, 70),
        (HOST, 70, 50),
        (CARD, 100, 80),
        (CARD, 75, 60),
        (replace(CARD, reserved_interval_bytes=None), 100, 60),
        (replace(CARD, reserved_interval_bytes=(55, None)), 100, 60),
        (replace(HOST, interval_bytes=(40, None)), 100, None),
        (None, 100, None),
    ],
)
def test_what_is_expected_is_the_upper_bound_inside_the_budget(
    planned: Plan | None, budget: int, expected: int | None
) -> None:
    assert expected_bytes(planned, budget) == expected


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_a_card_that_a_run_does_not_use_is_not_watched(monkeypatch, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    manager = manager_for(MemoryConfig(), torch.device(kind))
    assert list(manager.histories) == ["host"]
