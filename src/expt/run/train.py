"""`TrainJob`: one training from its objects to its record.

``build -> fit -> test -> record``: objects come from `run.build`, the loop is `training`, and
whatever happens is written to ``result.json`` and the tracker before `run` returns or raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from expt.config.settings import RunContext, Settings
from expt.errors import RecoveryError, UserError
from expt.files import write_text
from expt.job import Cached, DataSet, Plotted, monitored
from expt.memory.measuring.budget import Budget
from expt.memory.planning.predict import Plan
from expt.memory.techniques.batch_norm import batch_statistics
from expt.memory.techniques.wrapping import bare
from expt.result import RunResult, load_launch, save_launch
from expt.run.build import assemble
from expt.run.fallback import folder, next_smaller, short_name
from expt.run.guard import MemoryGuard, advice, manager_for
from expt.run.planner import Planner
from expt.run.record import CONFIG_NAME, READINGS_NAME, Recorder, device_name
from expt.run.summary import plot_history, print_result
from expt.tracking.tracker import OncePerStep, open_tracker
from expt.training import checkpoint
from expt.training.batches import place
from expt.training.display import choose_display
from expt.training.evaluate import evaluate, predict
from expt.training.interruption import Interruption, Stopped
from expt.training.profiler import StepProfiler, TraceProfiler
from expt.training.reading import sample_name
from expt.training.stopping import Ending
from expt.training.trainer import Trainer
from expt.units import counted
from expt.uri import without_password

log = logging.getLogger(__name__)


@dataclass
class TrainJob:
    """One training with everything it was given, and its record as it grows."""

    cfg: DictConfig
    settings: Settings
    context: RunContext
    fabric: Fabric
    data: DataSet
    interruption: Interruption
    budget: Budget | None
    planned: Plan | None

    def __post_init__(self) -> None:
        preset = self.settings.memory.preset
        self.recorder = Recorder(
            self.context.run_dir,
            open_tracker(self.settings.tracking, self.context.run_dir, self.context.parent_dir),
            RunResult(
                "failed",
                "error",
                preset=preset.value if preset else None,
                device=device_name(self.fabric.device),
                precision=str(self.fabric.strategy.precision.precision),
            ),
        )
        self.recorder.result.data_fingerprint = self.data.fingerprint()
        metrics = self.data.metrics
        monitor = monitored(metrics, self.settings.trainer.monitor)
        self.recorder.result.describe(metrics, monitor.name)
        self.recorder.plan(self.planned, self.budget.bytes if self.budget else None)
        device = self.fabric.device
        self.manager = manager_for(self.settings.memory, device)
        predict = (
            Planner(self.settings, None, "cuda", evaluation=False)
            if device.type == "cuda"
            else Planner(self.settings, self.data, "cpu", evaluation=False)
        )
        self.guard = MemoryGuard(self.settings.memory, self.budget, device, self.recorder, predict)

    def run(self, resuming: bool) -> RunResult:
        """Build, fit, test, record; a fault is recorded before it is raised again."""
        exhausted: str | None = None
        with self._recorded():
            try:
                with self.guard.enforced() as self.meter:
                    trainer = self.guard.recovery.retry_once(self._build, "build")
                    step = trainer.resume() if resuming else 0
                    try:
                        self._begin(trainer, step, resuming)
                        self._conclude(trainer, trainer.fit())
                    finally:
                        trainer.batches.close()
                    del trainer
            except RecoveryError as error:
                exhausted = str(error)
            if exhausted is not None:
                self._give_up(exhausted)
        self.recorder.close()
        print_result(self.recorder.result, self.context.run_dir)
        if self.interruption.received is not None:
            raise Stopped(self.interruption.received)
        return self.recorder.result

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Record a fault before it goes on; a refusal before the start leaves nothing to record."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, UserError) and not self.recorder.started:
                raise
            self._start()
            self.recorder.close_after(error)
            raise

    def _begin(self, trainer: Trainer, step: int, resuming: bool) -> None:
        result, run_dir = self.recorder.result, self.context.run_dir
        result.resumed_from_step = step
        self.recorder.earlier_oom_events(self.guard.recovery.events)
        self.guard.recovery.events = list(result.oom_events)
        self._start()
        if resuming:
            self.manager.resume(run_dir / READINGS_NAME, step)
            print(
                f"resuming {run_dir} at step {step}"
                if step
                else f"nothing to resume: no step was saved in {run_dir} yet, starting afresh"
            )
        self._announce(trainer)

    def _give_up(self, message: str) -> None:
        """Say that memory is not enough, and which smaller run takes over, if one is wanted."""
        entry = next_smaller(self.settings, self.context)
        size = None if entry is None else short_name(entry)
        self._start()
        print(f"{message}. {advice(self.settings.memory, size, self.fabric.device.type)}")
        result = self.recorder.result
        result.status, result.stop_reason = "failed", "out_of_memory"
        if entry is not None:
            result.fallback_run = str(folder(self.context.run_dir, entry))
            self.recorder.tracker.tags({"fallback_run": result.fallback_run})

    def _start(self) -> None:
        """Say in the directory and the tracker that there is a run now; once."""
        if self.recorder.started:
            return
        resolved = OmegaConf.to_container(self.cfg, resolve=True, enum_to_str=True)
        assert isinstance(resolved, dict)
        name = f"{self._model_name()}-{self.recorder.result.preset or 'lite'}"
        self.recorder.start(
            f"{name}-{self.context.run_dir.name}",
            _parameters(resolved),
            {
                "model": self._model_name(),
                "data.fingerprint": str(self.recorder.result.data_fingerprint),
                **self.context.fallback_of,
            },
        )
        if load_launch(self.context.run_dir) is None:
            save_launch(self.context.run_dir, self.context.launch)
        for group, name in (("tracking", "uri"), ("search", "storage")):
            if resolved.get(group) and resolved[group][name]:
                resolved[group][name] = without_password(resolved[group][name])
        write_text(self.context.run_dir / CONFIG_NAME, OmegaConf.to_yaml(resolved))

    def _announce(self, trainer: Trainer) -> None:
        result = self.recorder.result
        print(
            f"{self._model_name()}, {result.parameters:,} parameters, {result.device}, "
            f"{result.precision}; {counted(trainer.steps_per_epoch, 'step')} an epoch, at most "
            f"{trainer.total_steps} in all; {self.context.run_dir}",
            flush=True,
        )
        self._say_what_is_not_exact(trainer)

    def _say_what_was_skipped(self, trainer: Trainer) -> None:
        """Name the samples that could not be read and were passed over."""
        skipped = sorted(trainer.batches.skipped)
        if skipped:
            names = [sample_name(self.data, (split, 0, index)) for split, index in skipped]
            more = f" and {len(names) - 5} more" if names[5:] else ""
            print(
                f"note: {counted(len(names), 'sample')} could not be read: "
                f"{', '.join(names[:5])}{more}"
            )

    def _say_what_is_not_exact(self, trainer: Trainer) -> None:
        """Say that statistics are over parts of the batch, where they are."""
        parts = trainer.recovery.techniques.gradient_accumulation
        layers = batch_statistics(trainer.model)
        if parts > 1 and layers:
            samples = -(-self.data.batch_size // parts)
            print(
                f"note: {self._model_name()} normalises over the batch in "
                f"{counted(len(layers), 'layer')}, and with gradient accumulation over {samples} "
                f"of {self.data.batch_size} samples at a time, which is not the same as the whole "
                "batch; memory.batch_norm=group or frozen is exact",
                flush=True,
            )

    def _build(self) -> Trainer:
        settings, fabric = self.settings, self.fabric
        fabric.seed_everything(settings.trainer.seed, verbose=False)
        _set_deterministic(settings.trainer.deterministic)
        place(self.data, fabric.device)
        model, optimizer = assemble(settings, fabric, self.data)
        for owner in (self.data, bare(model)):
            if isinstance(owner, Cached):
                self.manager.on_cleanup(owner.clear)
        self.recorder.result.parameters = sum(weight.numel() for weight in model.parameters())
        profile = settings.trainer.profile
        return Trainer(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            data=self.data,
            settings=settings.trainer,
            recovery=self.guard.recovery,
            meter=self.meter,
            tracker=OncePerStep(self.recorder.tracker),
            display=choose_display(settings.trainer.progress),
            interruption=self.interruption,
            manager=self.manager,
            profiler=TraceProfiler(self.context.run_dir) if profile else StepProfiler(),
            run_dir=self.context.run_dir,
            loader=settings.loader,
        )

    def _conclude(self, trainer: Trainer, outcome: Ending) -> None:
        """Test if training ended as it should; the status is set when all of it went well."""
        recorder, result = self.recorder, self.recorder.result
        recorder.progress(trainer)
        if outcome.reason != "out_of_memory":  # else they may be half of a step on
            hashed = partial(checkpoint.weights_sha256, trainer.model)
            result.weights_sha256 = self.guard.recovery.retry_once(hashed, "conclusion")
        folder = self.context.run_dir / "plots"
        plots = list(plot_history(trainer.progress.history, trainer.monitor, folder))
        if outcome.status == "completed" and trainer.settings.test:
            outcome, more = self._test(trainer, outcome, folder)
            plots += more
        elif outcome.reason == "out_of_memory":
            self._give_up(str(outcome.message))
        elif outcome.reason == "non_finite_loss":
            print(
                f"The loss is not finite at step {outcome.step}: the run diverged. The last "
                "checkpoint is from before; try a lower optimizer.lr, or memory.precision=fp32."
            )
        self._say_what_was_skipped(trainer)
        recorder.watched(self.manager)
        recorder.artifacts(plots)
        result.status, result.stop_reason = outcome.status, outcome.reason

    def _test(self, trainer: Trainer, outcome: Ending, folder: Path) -> tuple[Ending, list[Path]]:
        """Test the best weights once; a signal stops it, and a resumed run tests again."""
        load = partial(checkpoint.load_best, trainer.folder, self.fabric, trainer.model)
        self.guard.recovery.retry_once(load, "resume")
        metrics = evaluate(
            trainer.model,
            trainer.batches,
            "test",
            trainer.meter,
            trainer.settings.eval_batches,
            lambda: self.interruption.received is not None,
            self.guard.recovery,
        )
        self.recorder.memory(trainer.meter)
        if metrics is None:
            return Ending("stopped", "signal", outcome.step), []
        recovery = self.guard.recovery
        figures = recovery.retry_once(metrics.compute, "conclusion")
        self.recorder.result.metrics |= {f"test/{name}": value for name, value in figures.items()}
        self.recorder.result.skipped_samples = len(trainer.batches.skipped)
        if not isinstance(self.data, Plotted):
            return outcome, []
        plots = self.data.plots(
            lambda batch: predict(trainer.model, batch, recovery), metrics, folder
        )
        return outcome, list(plots)

    def _model_name(self) -> str:
        return str(self.settings.arguments["model"]["_target_"]).rpartition(".")[2]


def _set_deterministic(wanted: bool) -> None:
    """Allow or refuse non-deterministic kernels, also after another run in this process."""
    if wanted:
        # cuBLAS reads this when it starts (CUDA's documentation on reproducible results).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def _parameters(resolved: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the settings that a run is compared by: not where it is recorded, or read from."""
    found = {str(key): value for key, value in resolved.items() if key != "tracking"}
    found["memory"] = {k: v for k, v in found["memory"].items() if k != "plan_file"}
    if found.get("search"):
        found["search"] = {k: v for k, v in found["search"].items() if k != "storage"}
    return found
