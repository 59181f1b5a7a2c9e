from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from expt.commands.multirun import Grid
from expt.config.schema import TrackingConfig


def test_the_parents_parameters_hold_no_password(tmp_path, monkeypatch) -> None:
    started: list[dict[str, Any]] = []

    class Told:
        def start(self, name: str, parameters: dict[str, Any], tags: dict[str, str]) -> None:
            started.append(parameters)

    monkeypatch.setattr("expt.commands.multirun.open_tracker", lambda *arguments: Told())
    lines = ["tracking.uri=http://me:geheim@host", "memory=lite,full"]
    config = OmegaConf.create(
        {
            "search": None,
            "tracking": OmegaConf.structured(TrackingConfig),
            "hydra": {"overrides": {"task": lines}, "sweep": {"dir": str(tmp_path)}},
        }
    )
    grid = Grid()
    grid.on_multirun_start(config)
    grid.on_job_start(config)
    assert started == [{"overrides": "tracking.uri=http://me:***@host memory=lite,full"}]
