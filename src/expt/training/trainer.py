"""The training loop: short, visible, and able to go on from any step.

`Trainer.fit` runs epochs of `train_step`, validates, keeps the best weights, and stops for one
of the reasons in `StopReason`. The batch of one optimizer step is cut into micro-batches whose
summed losses are divided by the weight of the whole batch, so that gradient accumulation does
not change the mathematics, whatever is masked. A step that runs out of memory is taken again with
techniques that save some (`expt.memory.recovery.recovery`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.config.schema import LoaderConfig, TrainerConfig
from expt.errors import BrokenStepError, DataError, LoaderError, RecoveryError
from expt.job import DataSet, Described, monitored
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.recovery.attempt import Success, attempt
from expt.memory.recovery.recovery import Recovery
from expt.memory.watching.manager import MemoryManager
from expt.tracking.tracker import Tracker
from expt.training import checkpoint, schedules
from expt.training.average import average_for
from expt.training.batches import Batches, Samples, StoppedWaitingError, micro_batches
from expt.training.checkpoint import Progress
from expt.training.display import Display, ProgressFile
from expt.training.evaluate import evaluate
from expt.training.interruption import Interruption
from expt.training.losses import LossReader
from expt.training.profiler import StepProfiler
from expt.training.steps.choose import steps_for
from expt.training.stopping import Ending, StopReason, limit_reached
from expt.units import format_bytes, format_seconds


@dataclass
class Trainer:
    """One run's loop; everything it needs is handed to it.

    `model` and `optimizer` come from `fabric.setup`, with `recovery.techniques` on them;
    `interruption` is read between steps.
    """

    fabric: Fabric
    model: nn.Module
    optimizer: Optimizer
    data: DataSet
    settings: TrainerConfig
    recovery: Recovery
    meter: MemoryMeter
    tracker: Tracker
    display: Display
    interruption: Interruption
    profiler: StepProfiler
    run_dir: Path
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    manager: MemoryManager = field(default_factory=lambda: MemoryManager(monitoring=False))

    def __post_init__(self) -> None:
        self.monitor = monitored(self.data.metrics, self.settings.monitor)
        self.batches = Batches(
            self.data,
            self.fabric.device,
            self.loader,
            self.settings.seed,
            self.settings.repeat_first_epoch,
            stopped=lambda: self.interruption.received is not None,
        )
        self.progress = Progress()
        self.folder = self.run_dir / checkpoint.FOLDER
        self.progress_file = ProgressFile(self.folder, f"val/{self.monitor.name}")
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
        self._scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.recovery.attach(self.model, self.optimizer, self._scaler)
        self.steps = steps_for(
            self.settings.compile,
            self.train_step,
            self.model,
            self.optimizer,
            self.recovery,
            min(self.data.batch_size, self.data.size("train")),
            scaler=self._scaler,
            processes=self.fabric.world_size,
            on_capture=self.meter.captured,
            streamed=self.batches.streamed,
        )
        self._waited_noted = 0.0
        self._losses = LossReader(self.fabric.device)
        on_host = self.fabric.device.type == "cpu"
        self._read_loss_every = 1 if on_host else self.settings.log_every_steps

    def resume(self) -> int:
        """Restore the last checkpoint, if there is one; return the step to go on from."""
        restored = self._load_last()
        if restored is not None:
            self.progress = restored
            self.batches.skipped |= {(split, index) for split, index in restored.skipped}
            self.recovery.restore(restored.recovery)
            self.meter.restore(restored.peak_allocated_bytes, restored.peak_reserved_bytes)
        return self.progress.step

    def fit(self) -> Ending:
        """Train until one of the reasons to stop; the checkpoints are complete when it returns.

        The workers that read samples stay for the test; whoever made the trainer closes `batches`.
        """
        self._started = time.monotonic() - self.progress.seconds
        if isinstance(self.data, Described):
            print(self.data.describe(), flush=True)
        self.display.start(self.total_steps, self.progress.step)
        self.model.train()
        if self.recovery.limits.enabled and self.progress.step == 0:
            self._save_last()  # what a step that breaks before the first checkpoint goes back to
        recovery = self.recovery
        try:
            while True:
                # An epoch that is under way, or was when the run was killed, gets its validation.
                under_way = self.progress.step_in_epoch > 0
                reason = None if under_way else limit_reached(self.progress, self.settings)
                if reason is None:
                    try:
                        outcome = attempt(self._epoch, recovery.classify, recovery.evidence)
                    except BrokenStepError:
                        outcome = None
                    # Outside the handler, whose traceback holds what the step had made.
                    if isinstance(outcome, Success):
                        reason = outcome.value
                    else:
                        if outcome is not None:
                            recovery.between_steps(outcome, self.data.batch_size)
                        self._go_back()
                if reason is not None:
                    return Ending.of(reason, self.progress.step)
        except RecoveryError as error:
            return Ending.of("out_of_memory", self.progress.step, str(error))
        finally:
            self.display.stop()
            self.profiler.stop()

    def train_step(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Do one optimizer step on these samples; return (mean loss, weight) on the device."""
        weight = samples.weight()
        total = torch.zeros((), device=self.fabric.device)
        for part in micro_batches(samples, self.recovery.techniques.gradient_accumulation):
            self.recovery.phase = "forward"
            batch = part.batch()
            loss = self.data.loss(self.model(**batch.inputs), batch) / weight
            self.recovery.phase = "backward"
            self.fabric.backward(loss)
            total += loss.detach()
        self._clip_gradients()
        self.recovery.phase = "optimizer_step"
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, weight

    def _go_back(self) -> None:
        """Go on from the last checkpoint: a step is broken, or memory ran out between two."""
        broken_at = self.progress.step
        restored = self._load_last()
        assert restored is not None, "fit saves one before the first step"
        self.progress = restored
        print(f"back at step {restored.step}: the steps up to {broken_at} are done again")

    def _epoch(self) -> StopReason | None:
        """Run the rest of the current epoch and validate; return why to stop, if so."""
        progress = self.progress
        self.model.train()  # an evaluation may have broken off
        self.recovery.position = (progress.step, progress.epoch)
        place = (progress.epoch, progress.step_in_epoch, self.steps_per_epoch)
        batches = self.recovery.retry_once(partial(self.batches.training, *place), "epoch")
        self.meter.start_epoch()
        loss_sum = torch.full((), progress.epoch_loss, device=self.fabric.device)
        weight_sum = torch.full((), progress.epoch_weight, device=self.fabric.device)
        limit = limit_reached(progress, self.settings, before_validation=True)
        while progress.step_in_epoch < self.steps_per_epoch and limit is None:
            self._set_rate(progress.step / self.total_steps)
            self.recovery.position = (progress.step, progress.epoch)
            try:
                samples = next(batches)
            except StoppedWaitingError:
                return self._stop_between(loss_sum, weight_sum)
            except (LoaderError, DataError):
                self._stop_between(loss_sum, weight_sum)  # the run can go on from here
                raise
            undo = not self.steps.replays(samples)
            with self.meter.step():
                loss, weight = self.recovery.step(self.steps.run, samples, len(samples), undo)
            self.average.update(progress.step)
            loss_sum += loss * weight
            weight_sum += weight
            progress.step += 1
            progress.step_in_epoch += 1
            self.profiler.step()
            limit = self._after_step(loss, loss_sum, weight_sum)
        if limit in ("signal", "non_finite_loss"):
            return limit
        self._note_sums(loss_sum, weight_sum)
        return self._validate(progress.epoch_loss, progress.epoch_weight) or limit

    def _stop_between(self, loss_sum: Tensor, weight_sum: Tensor) -> StopReason:
        """Save what a stop before the next step leaves; the losses so far are looked at."""
        if not all(reading.finite for reading in self._losses.readings(wait=True)):
            return "non_finite_loss"
        self._note_sums(loss_sum, weight_sum)
        self._save_last()
        return "signal"

    def _note_sums(self, loss_sum: Tensor, weight_sum: Tensor) -> None:
        """Take the epoch's sums so far, and the time spent waiting, into what is saved."""
        progress = self.progress
        progress.epoch_loss, progress.epoch_weight = float(loss_sum), float(weight_sum)
        progress.data_seconds += self.batches.waited_seconds - self._waited_noted
        self._waited_noted = self.batches.waited_seconds

    def _after_step(self, loss: Tensor, loss_sum: Tensor, weight_sum: Tensor) -> StopReason | None:
        """Read, report and save what is due; return why to stop before the epoch is over."""
        progress, settings = self.progress, self.settings
        due = (
            settings.checkpoint_every_steps is not None
            and progress.step % settings.checkpoint_every_steps == 0
        )
        last = progress.step >= self.total_steps or progress.step_in_epoch == self.steps_per_epoch
        signal = self.interruption.received is not None
        now = due or last or signal
        if now or progress.step % self._read_loss_every == 0:
            self._losses.ask(progress.step, loss, loss_sum)
        seen: float | None = None
        for reading in self._losses.readings(wait=now):
            seen = reading.loss
            # The sum shows a bad step since the last look; the weights are then bad too.
            if not reading.finite:
                return "non_finite_loss"
            if reading.step % settings.log_every_steps == 0:
                self.tracker.metrics({"train/loss_step": seen}, reading.step)
        self.manager.step()
        self.display.step(progress.step, seen)
        value = progress.history[-1]["val"] if progress.history else None
        self.progress_file.write(progress.step, progress.epoch, value)
        progress.seconds = time.monotonic() - self._started
        if due or signal:
            self._note_sums(loss_sum, weight_sum)
            self._save_last()
        if signal:
            return "signal"
        return limit_reached(progress, settings, before_validation=True)

    def _validate(self, loss_sum: float, weight_sum: float) -> StopReason | None:
        """Close the epoch: validate, record, keep the best, save; return why to stop."""
        progress, monitor = self.progress, self.monitor
        self.recovery.position = (progress.step, progress.epoch)
        with self.average.exchanged():
            metrics = evaluate(
                self.model,
                self.batches,
                "val",
                self.meter,
                self.settings.eval_batches,
                lambda: self.interruption.received is not None,
                self.recovery,
            )
        progress.seconds = time.monotonic() - self._started
        if metrics is None:
            progress.epoch_loss, progress.epoch_weight = loss_sum, weight_sum
            self._save_last()
            return "signal"
        figures = metrics.compute()
        if monitor.name not in figures:
            raise DataError(
                f"the data set monitors {monitor.name}, and its accumulator computes only "
                f"{', '.join(figures) or 'nothing'}"
            )
        value = figures[monitor.name]
        if not math.isfinite(value):
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
            "val": value,
            "rate": float(self.optimizer.param_groups[0]["lr"]),
            **({"data_seconds": progress.data_seconds} if self.batches.streamed else {}),
            **{name: float(count) for name, count in memory.items()},
        }
        progress.history.append(row)
        if monitor.better(value, progress.best):
            progress.best, progress.best_epoch = value, progress.epoch
            with self.average.exchanged():
                checkpoint.save_best(self.folder, self.fabric, self.model, progress)
        self._save_last()
        self._report(row, figures, memory)
        if self.interruption.received is not None:
            return "signal"
        return limit_reached(progress, self.settings)

    def _report(
        self, row: dict[str, float], figures: dict[str, float], memory: dict[str, int]
    ) -> None:
        """Send a finished epoch to the tracker, the display and the progress file."""
        progress, monitor = self.progress, self.monitor
        recorded = {
            "train/loss": row["loss"],
            "learning_rate": row["rate"],
            "epoch": row["epoch"],
            "seconds": row["seconds"],
            **{name: row[name] for name in ("data_seconds",) if name in row},
            f"best_val/{monitor.name}": cast(float, progress.best),
            **{f"val/{name}": value for name, value in figures.items()},
            **{f"memory/{name}": float(count) for name, count in memory.items()},
        }
        self.tracker.metrics(recorded, progress.step)
        peak = progress.peak_allocated_bytes
        line = (
            f"epoch {progress.epoch:3d}  step {progress.step}  train loss {row['loss']:.3f}  "
            f"val {monitor.name} {monitor.text(row['val'], unit=monitor.percent)}"
            f"{' *' if progress.best_epoch == progress.epoch else '  '}"
            f"  peak {format_bytes(peak)}  {format_seconds(progress.seconds)}"
        )
        self.display.epoch(line, monitor.text(row["val"]), peak)
        self.progress_file.write(progress.step, progress.epoch, row["val"], force=True)

    def _set_rate(self, progress: float) -> None:
        factor = self._rate_factor(progress)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor

    def _clip_gradients(self) -> None:
        if self.settings.gradient_clip_norm is None:
            return
        # Fabric refuses to unscale for fused optimizers; torch's own scaler does not.
        if self._scaler is not None:
            self._scaler.unscale_(getattr(self.optimizer, "optimizer", self.optimizer))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip_norm)

    def _load_last(self) -> Progress | None:
        load = partial(
            checkpoint.load_last,
            self.folder,
            self.fabric,
            self.model,
            self.optimizer,
            self.average,
        )
        self.steps.forget()
        self._losses.forget()
        return self.recovery.retry_once(load, "resume")

    def _save_last(self) -> None:
        self.progress.skipped = sorted([split, index] for split, index in self.batches.skipped)
        self.progress.run_id = self.tracker.run_id
        self.progress.recovery = self.recovery.state()
        checkpoint.save_last(
            self.folder, self.fabric, self.model, self.optimizer, self.average, self.progress
        )
