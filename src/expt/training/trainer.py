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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from expt.config.schema import LoaderConfig, TrainerConfig
from expt.config.stages import unreached
from expt.errors import BrokenStepError, ConfigError, DataError, LoaderError, RecoveryError
from expt.job import Batch, DataSet, Described, monitored
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.recovery.attempt import Failure, Success, attempt, release
from expt.memory.recovery.recovery import Recovery
from expt.memory.watching.manager import MemoryManager
from expt.tracking.tracker import Tracker
from expt.training import checkpoint, schedules
from expt.training.average import average_for
from expt.training.batches import (
    Batches,
    Samples,
    StoppedWaitingError,
    kept_on_device,
    micro_batches,
)
from expt.training.callbacks import Callbacks
from expt.training.checkpoint import Progress
from expt.training.display import Display, ProgressFile, epoch_line
from expt.training.evaluate import evaluate
from expt.training.evaluate import figures as figures_of
from expt.training.interruption import Interruption
from expt.training.losses import LossReader
from expt.training.profiler import StepProfiler, Watched
from expt.training.ranks import OneRank, SeveralRanks, is_shared_out
from expt.training.stages import Stages
from expt.training.steps.choose import steps_for
from expt.training.steps.eager import StepFunction
from expt.training.stopping import Ending, StopReason, limit_reached
from expt.training.tuning import tuner_for
from expt.units import with_gib


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
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How to build the model again; kept with the best weights."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    manager: MemoryManager = field(default_factory=lambda: MemoryManager("cpu", monitoring=False))
    after_epoch: Callable[[int, bool], Mapping[str, float]] = lambda epoch, whole: {}
    """Returns more figures ``GROUP/NAME`` of an epoch, counted from 0, for its row and tracker; it
    is told whether all of the epoch's steps were done."""
    before_save: Callable[[], None] = lambda: None
    """Called before a checkpoint is written, which must not be ahead of what it depends on."""
    on_stage: Callable[[int], None] = lambda number: None
    """Told the number of the stage, from 0, when other weights are trained than before."""
    ranks: OneRank = field(default_factory=OneRank)
    """The processes that train together; all of them have a trainer, and the first writes."""

    def __post_init__(self) -> None:
        self.monitor = monitored(self.data.metrics, self.settings.monitor)
        self.batches = Batches(
            self.data,
            self.fabric.device,
            self.loader,
            self.settings.seed,
            self.settings.repeat_first_epoch,
            stopped=self.interruption.signalled,
            ranks=self.ranks,
        )
        self.progress = Progress()
        self.folder = self.run_dir / checkpoint.FOLDER
        self.full_batch = min(self.data.batch_size, self.data.size("train"))
        batches = -(-self.data.size("train") // self.data.batch_size)
        self.steps_per_epoch = min(batches, self.settings.steps_per_epoch or batches)
        limit = self.settings.max_steps or float("inf")
        self.total_steps = int(min(limit, self.settings.epochs * self.steps_per_epoch))
        self.progress_file = ProgressFile(
            self.folder if self.ranks.first else None,
            f"val/{self.monitor.name}",
            {
                "total_steps": self.total_steps,
                "budget_bytes": self.budget_bytes,
                "predicted_peak_bytes": self.predicted_peak_bytes,
            },
        )
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._begin_schedule()
        self.average = average_for(self.model, self.settings.ema_decay)
        self._scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.recovery.attach(self.model, self.optimizer, self._scaler)
        self.stages = Stages(self.model, self.optimizer, self.settings.stages)
        if late := unreached(self.settings.trainable, self.settings.epochs):
            starts = ", ".join(map(str, late))
            print(
                f"trainer.trainable: what begins with epoch {starts} is not reached, since "
                f"trainer.epochs={self.settings.epochs}"
            )
        if self.stages.enter(0):
            self.on_stage(0)
        self._function = self._step_function()
        self.steps = steps_for(
            self.profiler.compile(self.settings.compile, self.fabric.device),
            self._function,
            self.model,
            self.optimizer,
            self.recovery,
            self.full_batch,
            scaler=self._scaler,
            processes=self.ranks.count,
            on_capture=self.meter.captured,
            streamed=self.batches.streamed,
        )
        self.tuner = tuner_for(self.data, self.budget_bytes, self.steps.forget, self.ranks.count)
        self._waited_noted = 0.0
        self._losses = LossReader(self.fabric.device, in_step=self.ranks.count > 1)
        on_host = self.fabric.device.type == "cpu"
        self._read_loss_every = 1 if on_host else self.settings.log_every_steps

    def _step_function(self) -> StepFunction:
        """Return what does a step: this trainer, or its part of one that several do together."""
        if not isinstance(self.ranks, SeveralRanks):
            return self.train_step
        from expt.training.steps.ranked import RankedStep

        return RankedStep(
            self.fabric, self.model, self.optimizer, self.data, self.recovery, self.ranks,
            self.profiler, self._clip_gradients,
        )  # fmt: skip

    def _enter_stage(self) -> None:
        """Train what the stage of this epoch trains; the rates go on as they were."""
        if not self.stages.enter(self.progress.epoch):
            return
        self.steps.forget()
        if hasattr(self._function, "regroup"):
            self._function.regroup()
        release(self.fabric.device)  # what the state that is gone had taken
        self.meter.start_stage()
        assert self.stages.current is not None
        self.on_stage(self.stages.current)
        print(self.stages.words(), flush=True)

    @property
    def fingerprint(self) -> str:
        """Of the data as they were read, before features stand for them; empty if not known."""
        return str(self.recipe.get("fingerprint") or "")

    def resume(self, extending: bool = False) -> int:
        """Restore the last checkpoint, if there is one; return the step to go on from.

        With `extending`, the run had come to its end, and goes on because its limits were raised.
        """
        restored = self._load_last()
        if restored is not None:
            if restored.monitor not in ("", self.monitor.name):
                raise ConfigError(
                    f"trainer.resume: the run has chosen its best epoch by {restored.monitor}, and "
                    f"now monitors {self.monitor.name}; set trainer.monitor={restored.monitor}, or "
                    "choose another hydra.run.dir"
                )
            known = checkpoint.trained_on(self.folder, restored)
            if known and self.fingerprint and known != self.fingerprint:
                print(
                    "note: the data, or how they are divided, have changed since the run was last "
                    "saved: it may have been trained on what it is now tested with. A new run, "
                    "without trainer.resume, begins with the data as they are",
                    flush=True,
                )
            opened = restored.uncut()
            if limit_reached(opened, self.settings) is None:
                restored = opened
            self.progress = restored
            self.batches.skipped |= {(split, index) for split, index in restored.skipped}
            self.recovery.restore(restored.recovery)
            self.meter.restore(restored.peak_allocated_bytes, restored.peak_reserved_bytes)
            self.tuner.restore(restored, self.batches)
            end = restored.schedule_end or (restored.step if extending else self.total_steps)
            if end <= restored.step < self.total_steps:
                restored.schedule_start = restored.step
                more = self.total_steps - restored.step
                print(schedules.extension_words(self.settings.schedule.value, more))
            self._begin_schedule()
            if extending:
                self._save_last()  # a run that is killed now knows where its schedule begins
        return self.progress.step

    def fit(self) -> Ending:
        """Train until one of the reasons to stop; the checkpoints are complete when it returns.

        The workers that read samples stay for the test; whoever made the trainer closes `batches`.
        """
        self._started = time.monotonic() - self.progress.seconds
        if isinstance(self.data, Described):
            print(self.data.describe(), flush=True)
        self.profiler.begin(
            Watched(
                self.fabric.device, self.model, self.optimizer, self.meter,
                averages=lambda: self.average.state_dict().values(),
                resident=lambda: kept_on_device(self.data),
            )
        )  # fmt: skip
        self.display.start(self.total_steps, self.progress.step)
        self.callbacks.run_start(self)
        self.model.train()
        if self.recovery.limits.enabled and self.progress.step == 0:
            self._save_last()  # what a step that breaks before the first checkpoint goes back to
        recovery = self.recovery
        outcome: Success[StopReason | None] | Failure | None
        try:
            while True:
                # An epoch that is under way, or was when the run was killed, gets its validation.
                under_way = self.progress.step_in_epoch > 0
                reason = None if under_way else limit_reached(self.progress, self.settings)
                if reason is None:
                    try:
                        if self.ranks.count > 1:  # between two steps the others wait for this one
                            outcome = Success(self._epoch())
                        else:
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
            if self.ranks.count > 1 and recovery.alone:
                raise  # the others know nothing of it, and would wait for this process
            return Ending.of("out_of_memory", self.progress.step, str(error))
        finally:
            self.display.stop()
            self.profiler.stop()

    def train_step(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Do one optimizer step on these samples; return (mean loss, weight) on the device."""
        weight = samples.weight()
        total = torch.zeros((), device=self.fabric.device)
        parts = self.recovery.techniques.gradient_accumulation
        for part in micro_batches(samples, parts, self.full_batch):
            self.recovery.phase = "forward"
            with self.profiler.phase("batch"):
                batch = part.batch()
            loss = self._loss(batch, weight)
            self.recovery.phase = "backward"
            with self.profiler.phase("backward"):
                self.fabric.backward(loss)
            total += loss.detach()
        with self.profiler.phase("optimizer_step"):
            self._clip_gradients()
            self.recovery.phase = "optimizer_step"
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total, weight

    def _loss(self, batch: Batch, weight: Tensor) -> Tensor:
        """Return a micro-batch's part of the loss; what the model returned is not held on to."""
        with self.profiler.phase("forward"):
            outputs = self.model(**batch.inputs)
        with self.profiler.phase("loss"):
            return self.data.loss(outputs, batch) / weight

    def _go_back(self) -> None:
        """Go on from the last checkpoint: a step is broken, or memory ran out between two."""
        broken_at = self.progress.step
        restored = self._load_last()
        assert restored is not None, "fit saves one before the first step"
        self.progress = restored
        self.stages.current = None  # what its stage does not train has its state again
        print(f"back at step {restored.step}: the steps up to {broken_at} are done again")

    def _epoch(self) -> StopReason | None:
        """Run the rest of the current epoch and validate; return why to stop, if so."""
        progress = self.progress
        self._enter_stage()
        self.model.train()  # an evaluation may have broken off
        self.recovery.position = (progress.step, progress.epoch)
        place = (progress.epoch, progress.step_in_epoch, self.steps_per_epoch)
        batches = self.recovery.retry_once(partial(self.batches.training, *place), "epoch")
        self.meter.start_epoch()
        loss_sum = torch.full((), progress.epoch_loss, device=self.fabric.device)
        weight_sum = torch.full((), progress.epoch_weight, device=self.fabric.device)
        share = self.ranks.share(self.full_batch).largest
        limit = limit_reached(progress, self.settings, before_validation=True)
        while progress.step_in_epoch < self.steps_per_epoch and limit is None:
            start = progress.schedule_start
            self._set_rate((progress.step - start) / (self.total_steps - start))
            self.recovery.position = (progress.step, progress.epoch)
            try:
                samples = next(batches)
            except (StoppedWaitingError, LoaderError, DataError) as error:
                if self.ranks.count > 1:
                    raise  # to save takes all processes, and the others are in the step
                stop = self._stop_between(loss_sum, weight_sum)  # the run can go on from here
                if isinstance(error, StoppedWaitingError):
                    return stop
                raise
            undo = not self.steps.replays(samples)
            # The averages live throughout, and only move between the steps that are watched.
            self.meter.take_in([*samples.on_host(), *self.average.state_dict().values()])
            self.profiler.take_in(samples.on_host())
            with self.meter.step():
                loss, weight = self.recovery.step(self.steps.run, samples, share, undo)
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
        finite = all(reading.finite for reading in self._losses.readings(wait=True))
        if not finite or not self._weights_finite():
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
        signal = self._agree()
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
        if self.manager.step():
            self.display.memory(self.manager.line())
        self.display.step(progress.step, seen)
        value = progress.history[-1]["val"] if progress.history else None
        memory = self.manager.now
        self.progress_file.write(progress.step, progress.epoch, value, memory=memory)
        if due or signal:
            if not self._weights_finite():
                return "non_finite_loss"
            self._note_sums(loss_sum, weight_sum)
            self._save_last()
        if signal:
            return "signal"
        return limit_reached(progress, settings, before_validation=True)

    def _agree(self) -> bool:
        """Note the time; return whether a signal came, here or in another process."""
        elapsed = time.monotonic() - self._started
        signal, self.progress.seconds = self.ranks.agree(
            self.interruption.received is not None, elapsed
        )
        return signal

    def _validate(self, loss_sum: float, weight_sum: float) -> StopReason | None:
        """Close the epoch: validate, record, keep the best, save; return why to stop."""
        progress, monitor = self.progress, self.monitor
        self.recovery.position = (progress.step, progress.epoch)
        stop = self.interruption.signalled
        with self.average.exchanged(), self.profiler.phase("evaluation"):
            metrics = evaluate(
                self.model, self.batches, "val", self.meter, self.settings.eval_batches, stop,
                self.recovery,
            )  # fmt: skip
        self._agree()
        if metrics is None:
            if not self._weights_finite():
                return "non_finite_loss"
            progress.epoch_loss, progress.epoch_weight = loss_sum, weight_sum
            self._save_last()
            return "signal"
        figures = self.ranks.from_first(partial(figures_of, metrics))
        if monitor.name not in figures:
            raise DataError(
                f"the data set monitors {monitor.name}, and its accumulator computes only "
                f"{', '.join(figures) or 'nothing'}"
            )
        value = figures[monitor.name]
        if not math.isfinite(value):
            return "non_finite_loss"
        self.callbacks.evaluation_end(self, "val", figures)
        whole = progress.step_in_epoch >= self.steps_per_epoch
        progress.cut = None if whole else [progress.step_in_epoch, loss_sum, weight_sum]
        progress.epoch += 1
        progress.step_in_epoch = 0
        progress.epoch_loss = progress.epoch_weight = 0.0
        memory = self.ranks.largest(self.meter.epoch())
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
            **self.after_epoch(progress.epoch - 1, whole),
        }
        progress.history.append(row)
        improved = monitor.better(value, progress.best)
        if improved:
            progress.best, progress.best_epoch = value, progress.epoch
            with self.average.exchanged():
                checkpoint.save_best(
                    self.folder, self.fabric, self.model, progress, self.recipe, self.ranks
                )
        signal = self._agree()
        limit = limit_reached(progress, self.settings)
        if limit is None and not signal:
            self.tuner.after_epoch(progress, self.batches, self.recovery)
        # First, as an epoch that is saved is not done again; the tracker drops what it has already.
        self._record(row, figures, memory)
        self._save_last()
        self._report(row, improved)
        return "signal" if signal else limit

    def _record(
        self, row: dict[str, float], figures: dict[str, float], memory: dict[str, int]
    ) -> None:
        """Send a finished epoch to the tracker."""
        progress, monitor = self.progress, self.monitor
        recorded = {
            "train/loss": row["loss"],
            "learning_rate": row["rate"],
            "epoch": row["epoch"],
            "seconds": row["seconds"],
            **{name: row[name] for name in row if name == "data_seconds" or "/" in name},
            f"best/val/{monitor.name}": cast(float, progress.best),
            **{f"val/{name}": value for name, value in figures.items()},
            **{f"memory/{name}": float(count) for name, count in memory.items()},
        }
        self.tracker.metrics(with_gib(recorded), progress.step)

    def _report(self, row: dict[str, float], is_best: bool) -> None:
        """Tell the display, the progress file and the callbacks of an epoch that is saved."""
        progress, monitor = self.progress, self.monitor
        peak = progress.peak_allocated_bytes
        line = epoch_line(row, monitor, is_best, peak)
        self.display.epoch(line, monitor.text(row["val"]), peak)
        self.progress_file.write(progress.step, progress.epoch, row["val"], True, self.manager.now)
        self.callbacks.epoch_end(self, row)

    def _begin_schedule(self) -> None:
        """Let the rate go over the steps from where the schedule begins to the last."""
        self.progress.schedule_end = self.total_steps
        self._rate_factor = schedules.of(self.settings, self.progress.schedule_start > 0)

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
            self.ranks,
        )
        self.steps.forget()
        self._losses.forget()
        return self.recovery.retry_once(load, "resume")

    def _weights_finite(self) -> bool:
        """Tell whether the last update spoilt no weight: its loss was computed before it."""
        weights = [
            weight.detach()
            for weight in self.model.parameters()
            if weight.requires_grad
            and weight.is_floating_point()
            and weight.numel()
            and not is_shared_out(weight)
        ]
        return not weights or bool(get_total_norm(weights, float("inf")).isfinite())

    def _save_last(self) -> None:
        self.before_save()
        self.batches.share_skipped()
        self.progress.skipped = sorted([split, index] for split, index in self.batches.skipped)
        self.progress.run_id = self.tracker.run_id
        self.progress.monitor, self.progress.data = self.monitor.name, self.fingerprint
        self.progress.recovery = self.recovery.state()
        checkpoint.save_last(
            self.folder, self.fabric, self.model, self.optimizer, self.average, self.progress,
            self.ranks,
        )  # fmt: skip
