"""`task=train`: train, validate, test, record. The main job.

``build -> fit -> test -> record``: objects come from `construction`, the loop is `training`, and
whatever happens is written to ``result.json`` and the tracker before this returns or raises.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import nn

from expt import __version__, checkpoint
from expt.acceleration import make_fabric
from expt.construction import RunContext, Settings, assemble, build, validated
from expt.errors import StorageError, UserError
from expt.evaluation import evaluate, predict
from expt.files import write_json
from expt.interruption import Interruption, Stopped
from expt.memory.meter import meter_for
from expt.profiling import StepProfiler, TraceProfiler
from expt.progress import choose_display
from expt.protocols import DataSet, MemoryMeter, Metrics, Tracker
from expt.report import plot_history, print_result
from expt.results import RunResult, load_result
from expt.schema import TrackingConfig
from expt.training import Outcome, Trainer

MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def run(cfg: DictConfig, context: RunContext) -> RunResult:
    """Run one training and return how it ended.

    Raises:
        UserError: a problem in the configuration or the data; nothing was started.
        StorageError: the output directory refused a write.
        Stopped: SIGINT or SIGTERM; everything is saved and recorded.

    """
    settings = validated(cfg, context.overridden)
    resuming = settings.trainer.resume is not False
    if resuming:
        done = load_result(context.run_dir)
        if done is not None and done.status == "completed":
            print(f"{context.run_dir} is already completed; this is its result.")
            print_result(done, context.run_dir)
            return done
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    data: DataSet = build(settings, "data")
    with Interruption() as interruption:
        tracker = _tracker(settings.tracking, context)
        job = TrainJob(cfg, settings, context, fabric, data, tracker, interruption)
        return job.run(resuming)


@dataclass
class TrainJob:
    """One training with everything it was given, and its result as it grows."""

    cfg: DictConfig
    settings: Settings
    context: RunContext
    fabric: Fabric
    data: DataSet
    tracker: Tracker
    interruption: Interruption

    def __post_init__(self) -> None:
        self._started = False
        preset = self.settings.memory.preset
        self.result = RunResult(
            "failed",
            "error",
            preset=preset.value if preset else None,
            device=_device_name(self.fabric.device),
        )

    def run(self, resuming: bool) -> RunResult:
        """Build, fit, test, record; a fault is recorded before it is raised again."""
        try:
            trainer = self._build()
            self.result.resumed_from_step = trainer.resume() if resuming else 0
            self._start_tracking()
            if resuming:
                self._say_what_was_resumed()
            outcome = trainer.fit()
            self._finish(trainer, outcome)
        except UserError:
            raise  # found while building: nothing was started, so there is nothing to record
        except BaseException as error:
            self._start_tracking()
            if isinstance(error, KeyboardInterrupt):
                self.result.status = "stopped"
            self.result.stop_reason = f"{type(error).__name__}: {error}"[:500]
            # The first error is the one to report, also when recording it fails.
            with contextlib.suppress(StorageError):
                self._record()
            raise
        self._record()
        print_result(self.result, self.context.run_dir)
        if outcome.reason == "signal":
            raise Stopped(self.interruption.received or 0)
        return self.result

    def _start_tracking(self) -> None:
        if not self._started:
            self._started = True
            self.tracker.start(self._name(), self._parameters(), self._tags())

    def _build(self) -> Trainer:
        settings, fabric = self.settings, self.fabric
        fabric.seed_everything(settings.trainer.seed, verbose=False)
        if settings.trainer.deterministic:
            torch.use_deterministic_algorithms(True)
        self.data.to(fabric.device)
        model, optimizer = assemble(settings, fabric, self.data)
        self.result.parameters = sum(weight.numel() for weight in model.parameters())
        profile = settings.trainer.profile
        return Trainer(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            data=self.data,
            settings=settings.trainer,
            gradient_accumulation=settings.memory.gradient_accumulation,
            meter=meter_for(fabric.device),
            tracker=self.tracker,
            display=choose_display(settings.trainer.progress),
            interruption=self.interruption,
            profiler=TraceProfiler(self.context.run_dir) if profile else StepProfiler(),
            run_dir=self.context.run_dir,
        )

    def _finish(self, trainer: Trainer, outcome: Outcome) -> None:
        """Fill the result from where the loop ended; test if it ended as it should."""
        result, progress = self.result, trainer.progress
        result.status, result.stop_reason = outcome.status, outcome.reason
        result.epochs, result.steps, result.seconds = (
            progress.epoch,
            progress.step,
            progress.seconds,
        )
        result.weights_sha256 = checkpoint.weights_sha256(trainer.model)
        monitor = self.data.monitor
        if progress.history:
            result.metrics[f"val/{monitor}"] = progress.best
        plots = list(plot_history(progress.history, monitor, self.context.run_dir / "plots"))
        if outcome.status == "completed":
            checkpoint.load_best(trainer.folder, self.fabric, trainer.model)
            metrics = evaluate(
                self.fabric,
                trainer.model,
                self.data,
                "test",
                trainer.meter,
                trainer.settings.eval_batches,
            )
            assert metrics is not None
            result.metrics |= {f"test/{key}": value for key, value in metrics.compute().items()}
            plots += self._data_plots(trainer.model, metrics)
        self._fill_memory(trainer.meter)
        if outcome.reason == "non_finite_loss":
            print(
                f"The loss is not finite at step {outcome.step}: the run diverged. The last "
                "checkpoint is from before; try a lower optimizer.lr, or memory.precision=fp32."
            )
        self._record_artifacts(trainer, plots)

    def _data_plots(self, model: nn.Module, metrics: Metrics) -> list[Path]:
        folder = self.context.run_dir / "plots"
        return list(self.data.plots(lambda batch: predict(model, batch), metrics, folder))

    def _fill_memory(self, meter: MemoryMeter) -> None:
        self.result.memory |= {
            "peak_allocated_bytes": meter.peak_allocated_bytes(),
            "peak_reserved_bytes": meter.peak_reserved_bytes(),
            "meter": meter.name,
        }

    def _record_artifacts(self, trainer: Trainer, plots: list[Path]) -> None:
        write_json(self.context.run_dir / "history.json", trainer.progress.history)
        best = trainer.folder / checkpoint.BEST
        if best.exists():
            self.tracker.artifact(best, "checkpoints")
        for plot in plots:
            self.tracker.artifact(plot, "plots")
        config = self.context.run_dir / ".hydra" / "config.yaml"
        if config.exists():
            self.tracker.artifact(config)
        self.tracker.artifact(self.context.run_dir / "history.json")

    def _record(self) -> None:
        """Write the result here and in the tracker, with the ids where they are known."""
        result, tracker = self.result, self.tracker
        figures = {name: value for name, value in result.metrics.items() if value is not None}
        figures |= {
            f"memory/{name}": float(value)
            for name, value in result.memory.items()
            if isinstance(value, int)
        }
        tracker.metrics({**figures, "seconds": result.seconds}, result.steps)
        tracker.tags({"status": result.status, "stop_reason": result.stop_reason})
        tracker.flush()
        result.tracking = {
            "uri": tracker.uri,
            "run_id": tracker.run_id,
            "parent_run_id": tracker.parent_run_id,
        }
        result.save(self.context.run_dir)
        tracker.artifact(self.context.run_dir / "result.json")
        tracker.finish(MLFLOW_STATUS[result.status])  # type: ignore[arg-type]

    def _say_what_was_resumed(self) -> None:
        step = self.result.resumed_from_step
        where = self.context.run_dir
        print(f"resuming {where} at step {step}" if step else f"nothing to resume in {where}")

    def _name(self) -> str:
        return f"{self._model_name()}-{self.result.preset or 'lite'}-{self.context.run_dir.name}"

    def _model_name(self) -> str:
        return str(self.settings.arguments["model"]["_target_"]).rpartition(".")[2]

    def _parameters(self) -> Mapping[str, Any]:
        shown = ("task", "model", "data", "optimizer", "trainer", "memory")
        resolved = OmegaConf.to_container(self.cfg, resolve=True, enum_to_str=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items() if key in shown}

    def _tags(self) -> dict[str, str]:
        return {
            "preset": str(self.result.preset),
            "device": str(self.result.device),
            "model": self._model_name(),
            "data.fingerprint": self.data.fingerprint(),
            "run_dir": str(self.context.run_dir),
            "expt.version": __version__,
            "torch.version": torch.__version__,
            **_commit(),
        }


def _tracker(config: TrackingConfig, context: RunContext) -> Tracker:
    if config.uri is None:
        from expt.tracking.null import NullTracker

        return NullTracker()
    from expt.tracking.mlflow import MlflowTracker

    return MlflowTracker(
        uri=config.uri,
        experiment=config.experiment,
        directory=context.run_dir,
        artifact_root=Path(config.artifacts) if config.artifacts else None,
        parent_directory=context.parent_dir,
        flush_seconds=config.flush_seconds,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()})"


def _commit() -> dict[str, str]:
    """Return the commit of the current folder's repository, if it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}
