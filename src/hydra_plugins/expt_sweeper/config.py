"""Makes ``hydra/sweeper=expt`` known; the samplers are those of hydra-optuna-sweeper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ExptSweeperConfig:
    """Node ``hydra.sweeper``; everything but the sampler is in the node `search`."""

    _target_: str = "hydra_plugins.expt_sweeper.sweeper.ExptSweeper"
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}])
    sampler: Any = MISSING


ConfigStore.instance().store(
    group="hydra/sweeper", name="expt", node=ExptSweeperConfig, provider="expt"
)
