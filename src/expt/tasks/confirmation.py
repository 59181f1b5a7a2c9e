"""Two real optimizer steps with a micro-batch that was found by prediction, inside the budget.

They run with the pieces of a training: the same model, techniques, optimizer and loop, under the
same enforcement. The first makes the optimizer's state, the second runs beside it; a batch of
evaluation follows. Recovery is not asked: running out of memory is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from expt.construction import Settings, assemble, techniques_of
from expt.evaluation import evaluate
from expt.interruption import Interruption
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.meter import meter_for
from expt.memory.recovery.attempt import Success, attempt, release
from expt.memory.recovery.recovery import Recovery
from expt.memory.recovery.shortage import shortage
from expt.profiling import StepProfiler
from expt.progress import SilentDisplay
from expt.protocols import DataSet
from expt.tracking.null import NullTracker
from expt.training import Trainer

STEPS = 2


@dataclass(frozen=True)
class Confirmation:
    """Whether the steps stayed inside the budget, and the peak that was measured if so."""

    fits: bool
    peak_bytes: int | None
    reserved_bytes: int | None


def confirm(
    settings: Settings,
    fabric: Fabric,
    data: DataSet,
    micro_batch: int,
    accumulated: bool,
    budget: Budget,
    run_dir: Path,
) -> Confirmation:
    """Take the steps; `data` is on the device afterwards.

    Args:
        settings: model, optimizer and techniques.
        fabric: of the run's device.
        data: the samples.
        micro_batch: samples in a forward pass.
        accumulated: a step has more than one micro-batch; two of them show its peak.
        budget: enforced over all of it.
        run_dir: where the loop would write, if it wrote.

    """
    parts = 2 if accumulated else 1
    memory = replace(settings.memory, gradient_accumulation=parts)
    settings = replace(settings, memory=memory)

    def work() -> Confirmation:
        with budget.enforce(fabric.device) as ledger:
            meter = meter_for(fabric.device, ledger)
            fabric.seed_everything(settings.trainer.seed, verbose=False)
            data.to(fabric.device)
            model, optimizer = assemble(settings, fabric, data)
            trainer = Trainer(
                fabric=fabric,
                model=model,
                optimizer=optimizer,
                data=data,
                settings=settings.trainer,
                recovery=Recovery(techniques_of(memory), fabric.device),
                meter=meter,
                tracker=NullTracker(),
                display=SilentDisplay(),
                interruption=Interruption(),
                profiler=StepProfiler(),
                run_dir=run_dir,
            )
            indices = torch.arange(micro_batch * parts, device=fabric.device) % data.size("train")
            model.train()
            for _ in range(STEPS):
                trainer.train_step(indices)
            evaluate(fabric, model, data, "val", meter, max_batches=1)
            return Confirmation(True, meter.peak_allocated_bytes(), meter.peak_reserved_bytes())

    outcome = attempt(work, shortage)
    release(fabric.device)
    if isinstance(outcome, Success):
        return outcome.value
    return Confirmation(False, None, None)
