"""The training loop: short, visible, and able to go on from any step.

`Trainer.fit` runs epochs of `train_step`, validates, keeps the best weights, and stops for one
of the reasons in `StopReason`. The batch of one optimizer step is cut into micro-batches whose
summed losses are divided by the weight of the whole batch, so that gradient accumulation does
not change the mathematics, whatever is masked.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from expt import checkpoint
from expt.averaging import average_for
from expt.checkpoint import Progress
from expt.evaluation import evaluate
from expt.interruption import Interruption
from expt.optim import schedules
from expt.profiling import StepProfiler
from expt.progress import Display, ProgressFile
from expt.protocols import DataSet, MemoryMeter, Tracker
from expt.results import Status
from expt.schema import TrainerConfig
from expt.units import format_bytes, format_seconds

StopReason = Literal[
    "epochs", "max_steps", "time_limit", "early_stopping", "signal", "non_finite_loss"
]


@dataclass(frozen=True)
class Outcome:
    """Why `fit` returned; `step` is the optimizer step at which it did."""

    status: Status
    reason: StopReason
    step: int


@dataclass
class Trainer:
    """One run's loop; everything it needs is handed to it.

    `model` and `optimizer` come from `fabric.setup`; `interruption` is read between steps.
    """

    fabric: Fabric
    model: nn.Module
    optimizer: Optimizer
    data: DataSet
    settings: TrainerConfig
    gradient_accumulation: int
    meter: MemoryMeter
    tracker: Tracker
    display: Display
    interruption: Interruption
    profiler: StepProfiler
    run_dir: Path

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.folder = self.run_dir / checkpoint.FOLDER
        self.progress_file = ProgressFile(self.folder)
        batches = -(-self.data.size("train") // self.data.batch_size)
        self.steps_per_epoch = min(batches, self.settings.steps_per_epoch or batches)
        limit = self.settings.max_steps or float("inf")
        self.total_steps = int(min(limit, self.settings.epochs * self.steps_per_epoch))
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._rate_factor = schedules.factor(
            self.settings.schedule.value,
            self.settings.warmup_fraction,
            self.settings.step_milestones,
            self.settings.step_factor,
        )
        self.average = average_for(self.model, self.settings.ema_decay)
        on_host = self.fabric.device.type == "cpu"
        self._read_loss_every = 1 if on_host else self.settings.log_every_steps

    def resume(self) -> int:
        """Restore the last checkpoint, if there is one; return the step to go on from."""
        restored = checkpoint.load_last(
            self.folder, self.fabric, self.model, self.optimizer, self.average
        )
        if restored is not None:
            self.progress = restored
            self.meter.restore(restored.peak_allocated_bytes, restored.peak_reserved_bytes)
        return self.progress.step

    def fit(self) -> Outcome:
        """Train until one of the reasons to stop; the checkpoints are complete when it returns."""
        self._started = time.monotonic() - self.progress.seconds
        self.display.start(self.total_steps, self.progress.step)
        self.model.train()
        try:
            while True:
                # An epoch that is under way, or was when the run was killed, gets its validation.
                under_way = self.progress.step_in_epoch > 0
                reason = (None if under_way else self._reason_to_end()) or self._epoch()
                if reason is not None:
                    return self._outcome(reason)
        finally:
            self.display.stop()
            self.profiler.stop()

    def train_step(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on these samples [B]; return (mean loss, weight) on device."""
        weight = self.data.weight("train", indices)
        total = torch.zeros((), device=self.fabric.device)
        for part in indices.tensor_split(min(self.gradient_accumulation, len(indices))):
            batch = self.data.gather("train", part)
            loss = self.data.loss(self.model(**batch.inputs), batch) / weight
            self.fabric.backward(loss)
            total += loss.detach()
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, weight

    def _epoch(self) -> StopReason | None:
        """Run the rest of the current epoch and validate; return why to stop, if so."""
        progress = self.progress
        batches = self._order(progress.epoch).split(self.data.batch_size)
        self.meter.start_epoch()
        loss_sum = torch.full((), progress.epoch_loss, device=self.fabric.device)
        weight_sum = torch.full((), progress.epoch_weight, device=self.fabric.device)
        limit = self._reason_to_end(before_validation=True)
        while progress.step_in_epoch < self.steps_per_epoch and limit is None:
            self._set_rate(progress.step / self.total_steps)
            with self.meter.step():
                loss, weight = self.train_step(batches[progress.step_in_epoch])
            self.average.update()
            loss_sum += loss * weight
            weight_sum += weight
            progress.step += 1
            progress.step_in_epoch += 1
            self.profiler.step()
            limit = self._after_step(loss, loss_sum, weight_sum)
        if limit in ("signal", "non_finite_loss"):
            return limit
        return self._validate(float(loss_sum), float(weight_sum)) or limit

    def _after_step(self, loss: Tensor, loss_sum: Tensor, weight_sum: Tensor) -> StopReason | None:
        """Read, report and save what is due; return why to stop before the epoch is over."""
        progress, settings = self.progress, self.settings
        due = (
            settings.checkpoint_every_steps is not None
            and progress.step % settings.checkpoint_every_steps == 0
        )
        last = progress.step >= self.total_steps or progress.step_in_epoch == self.steps_per_epoch
        signal = self.interruption.received is not None
        seen: float | None = None
        if due or last or signal or progress.step % self._read_loss_every == 0:
            seen = float(loss)
            # The sum shows a bad step since the last look; the weights are then bad too.
            if not torch.isfinite(loss_sum):
                return "non_finite_loss"
        if seen is not None and progress.step % settings.log_every_steps == 0:
            self.tracker.metrics({"train/loss_step": seen}, progress.step)
        self.display.step(progress.step, seen)
        val = progress.history[-1]["val"] if progress.history else None
        self.progress_file.write(progress.step, progress.epoch, val)
        progress.seconds = time.monotonic() - self._started
        if due or signal:
            progress.epoch_loss, progress.epoch_weight = float(loss_sum), float(weight_sum)
            self._save_last()
        if signal:
            return "signal"
        return self._reason_to_end(before_validation=True)

    def _validate(self, loss_sum: float, weight_sum: float) -> StopReason | None:
        """Close the epoch: validate, record, keep the best, save; return why to stop."""
        progress, monitor = self.progress, self.data.monitor
        with self.average.exchanged():
            metrics = evaluate(
                self.fabric,
                self.model,
                self.data,
                "val",
                self.meter,
                self.settings.eval_batches,
                lambda: self.interruption.received is not None,
            )
        progress.seconds = time.monotonic() - self._started
        if metrics is None:
            progress.epoch_loss, progress.epoch_weight = loss_sum, weight_sum
            self._save_last()
            return "signal"
        figures = metrics.compute()
        val = figures[monitor]
        if not math.isfinite(val):
            return "non_finite_loss"
        progress.epoch += 1
        progress.step_in_epoch = 0
        progress.epoch_loss = progress.epoch_weight = 0.0
        memory = dict(self.meter.epoch())
        progress.peak_allocated_bytes = self.meter.peak_allocated_bytes()
        progress.peak_reserved_bytes = self.meter.peak_reserved_bytes()
        row = {
            "epoch": float(progress.epoch),
            "step": float(progress.step),
            "seconds": progress.seconds,
            "loss": loss_sum / max(weight_sum, 1.0),
            "val": val,
            "rate": self.optimizer.param_groups[0]["lr"],
            **{name: float(count) for name, count in memory.items()},
        }
        progress.history.append(row)
        if val < progress.best:
            progress.best, progress.best_epoch = val, progress.epoch
            with self.average.exchanged():
                checkpoint.save_best(self.folder, self.fabric, self.model, progress)
        self._save_last()
        self._report(row, figures, memory)
        return "signal" if self.interruption.received is not None else self._reason_to_end()

    def _report(
        self, row: dict[str, float], figures: dict[str, float], memory: dict[str, int]
    ) -> None:
        """Send a finished epoch to the tracker, the display and the progress file."""
        progress, monitor = self.progress, self.data.monitor
        recorded = {
            "train/loss": row["loss"],
            "learning_rate": row["rate"],
            "epoch": row["epoch"],
            "seconds": row["seconds"],
            f"best_val/{monitor}": progress.best,
            **{f"val/{name}": value for name, value in figures.items()},
            **{f"memory/{name}": float(count) for name, count in memory.items()},
        }
        self.tracker.metrics(recorded, progress.step)
        peak = progress.peak_allocated_bytes
        line = (
            f"epoch {progress.epoch:3d}  step {progress.step}  train loss {row['loss']:.3f}  "
            f"val {monitor} {row['val']:.3f}{' *' if progress.best == row['val'] else '  '}"
            f"  peak {format_bytes(peak)}  {format_seconds(progress.seconds)}"
        )
        self.display.epoch(line, row["val"], peak)
        self.progress_file.write(progress.step, progress.epoch, row["val"], force=True)

    def _reason_to_end(self, before_validation: bool = False) -> StopReason | None:
        """Return which limit is reached; early stopping is judged after validations only."""
        progress, settings = self.progress, self.settings
        if settings.max_steps is not None and progress.step >= settings.max_steps:
            return "max_steps"
        if progress.seconds >= (settings.time_limit_seconds or math.inf):
            return "time_limit"
        if before_validation:
            return None
        if progress.epoch >= settings.epochs:
            return "epochs"
        patience = settings.early_stopping_patience
        if patience is not None and progress.epoch - progress.best_epoch >= patience:
            return "early_stopping"
        return None

    def _outcome(self, reason: StopReason) -> Outcome:
        statuses: dict[StopReason, Status] = {"signal": "stopped", "non_finite_loss": "failed"}
        return Outcome(statuses.get(reason, "completed"), reason, self.progress.step)

    def _order(self, epoch: int) -> Tensor:
        """Return the epoch's order of samples, from seed and epoch alone, on the device."""
        epoch = 0 if self.settings.repeat_first_epoch else epoch
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(self.data.size("train"), generator=generator)
        return order.to(self.fabric.device)

    def _set_rate(self, progress: float) -> None:
        factor = self._rate_factor(progress)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor

    def _clip_gradients(self) -> None:
        if self.settings.gradient_clip_norm is None:
            return
        # Fabric refuses to unscale for fused optimizers; torch's own scaler does not.
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None:
            scaler.unscale_(getattr(self.optimizer, "optimizer", self.optimizer))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip_norm)

    def _save_last(self) -> None:
        self.progress.run_id = self.tracker.run_id
        checkpoint.save_last(
            self.folder, self.fabric, self.model, self.optimizer, self.average, self.progress
        )
