"""`task=replay`: send what a tracking server missed, for every run under `replay.root`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from expt.config.settings import RunContext
from expt.errors import ConfigError
from expt.tracking.replay import ReplayReport, replay


@dataclass(frozen=True)
class ReplayResult:
    """What was sent; exit code 1 while something is left."""

    report: ReplayReport

    @property
    def exit_code(self) -> int:
        """0 when nothing is left to send."""
        return 0 if self.report.complete else 1


def run(cfg: DictConfig, context: RunContext) -> ReplayResult:
    """Send every journal that has records its server did not acknowledge, and say which.

    Raises:
        ConfigError: `replay.root` is not a folder.

    """
    root = Path(cfg.replay.root)
    if not root.is_dir():
        raise ConfigError(f"replay.root={root}: there is no such folder; it holds the runs")
    report = replay(root)
    if not report.directories:
        print(f"nothing left to send under {root}")
    for entry in report.directories:
        left = "an unknown number" if entry.left is None else entry.left
        because = f" ({entry.reason})" if entry.reason else ""
        print(f"{entry.directory}: {entry.sent} records sent, {left} left{because}")
    return ReplayResult(report)
