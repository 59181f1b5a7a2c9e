"""The memory that a run may take, and how it goes on when that is not enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from expt.config.schema import MemoryConfig, Preset
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.meter import CudaMeter, LedgerMeter, meter_for
from expt.memory.planning.plan import Plan
from expt.memory.recovery.attempt import collect
from expt.memory.recovery.ladder import Predict
from expt.memory.recovery.limits import Limits
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import apply
from expt.memory.watching.alarms import ALARMS_NAME
from expt.memory.watching.manager import MemoryManager
from expt.run.build import smaller_sizes, techniques_of
from expt.run.record import Recorder
from expt.run.target import arithmetic

ELSEWHERE = "What would help: another device"


def advice(memory: MemoryConfig, takes_over: str | None, device: str) -> str:
    """Return what would help a run that memory was not enough for, in a sentence.

    Args:
        memory: as it was.
        takes_over: the smaller size that is tried next.
        device: type of the device.

    """
    ways = []
    if takes_over is None:
        ways.append(smaller_sizes(memory))
        if not memory.smaller_runs and memory.preset is not Preset.minimal:
            ways[-1] += ", or memory.fallback=preset to have it tried"
    if memory.budget is not None:
        ways.append("a higher memory.budget")
    if arithmetic(memory.precision, "cuda" if device == "cuda" else "cpu") == "fp32":
        ways.append("memory.precision=bf16")
    return f"What would help: {', '.join(ways)}, or another device" if ways else ELSEWHERE


class MemoryGuard:
    """A run's budget, if it has one, and its recovery, which tells `recorder` of every event."""

    def __init__(
        self,
        memory: MemoryConfig,
        budget: Budget | None,
        device: torch.device,
        recorder: Recorder,
        predict: Predict,
        ranks: int = 1,
    ) -> None:
        self._ranks = ranks
        self.device = device
        self.budget = budget
        folder = recorder.run_dir / EVIDENCE
        self.recovery = Recovery(
            techniques_of(memory),
            device,
            apply=apply,
            predict=predict,
            limits=Limits(memory.recover, memory.max_recoveries_per_step, memory.max_recoveries),
            budget_bytes=self.budget.bytes if self.budget else None,
            on_event=recorder.oom,
            collect=lambda number: collect(device, folder, number),
        )

    @contextmanager
    def enforced(
        self, manager: MemoryManager, planned: Plan | None
    ) -> Iterator[CudaMeter | LedgerMeter]:
        """Enforce the budget inside; yield the meter that goes with it.

        `manager` watches the budget, and rings above what is `planned`.
        """
        with self.budget.enforce(self.device) if self.budget else nullcontext() as ledger:
            if self.budget:
                manager.limit(self.budget.bytes, self.device, ledger)
                manager.expect(expected_bytes(planned, self.budget.bytes))
            yield meter_for(self.device, ledger, helped=self._ranks > 1)


def expected_bytes(planned: Plan | None, budget_bytes: int) -> int | None:
    """Return what a run may take of its budget when all goes as planned; None if nobody knows.

    It is the upper bound of the prediction where that is inside the budget, else the prediction.
    On CUDA both are of reserved bytes, which is what a budget limits there.
    """
    if planned is None or planned.interval_bytes[1] is None:
        return None
    high: int | None = planned.interval_bytes[1]
    if planned.reserved_bytes is not None:
        reserved = planned.reserved_interval_bytes
        high = planned.reserved_bytes if reserved is None else reserved[1]
    return high if high is not None and high < budget_bytes else planned.demand_bytes


def manager_for(
    memory: MemoryConfig, device: torch.device, run_dir: Path | None = None, warn: bool = True
) -> MemoryManager:
    """Return what watches a run's memory, and keeps its alarms in the run's directory."""
    return MemoryManager(
        device,
        gpu_threshold=memory.gpu_threshold,
        cpu_threshold=memory.cpu_threshold,
        interval=memory.cleanup_interval_seconds,
        force_cleanup_every=memory.force_cleanup_every,
        monitoring=memory.watch,
        alarm_file=None if run_dir is None else run_dir / ALARMS_NAME,
        warn=warn,
    )


EVIDENCE = Path("memory")
"""Folder in a run's directory for what was held when memory ran out."""
