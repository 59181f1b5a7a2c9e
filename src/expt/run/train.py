"""`TrainJob`: one training from its objects to its record.

``build -> fit -> test -> record``: objects come from `run.build`, the loop is `training`, and
whatever happens is written to ``result.json`` and the tracker before `run` returns or raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.config.settings import RunContext, Settings
from expt.drawing import drawn
from expt.errors import RecoveryError, UserError
from expt.files import write_json, write_text
from expt.job import (
    Accumulator,
    Advising,
    Batch,
    Cached,
    DataSet,
    Plotted,
    Split,
    monitored,
)
from expt.memory.measuring.budget import Budget
from expt.memory.planning.predict import Plan
from expt.memory.techniques.batch_norm import batch_statistics
from expt.memory.techniques.wrapping import bare
from expt.memory.watching.history import READINGS_NAME
from expt.result import CONFIG_NAME, FILE_NAME, RunResult, load_launch, save_launch
from expt.run.build import assemble, build_callbacks
from expt.run.fallback import folder, next_smaller, short_name
from expt.run.guard import MemoryGuard, advice, expected_bytes, manager_for
from expt.run.planner import Planner, plan_training
from expt.run.record import (
    SIGNATURE_NAME,
    Recorder,
    description,
    device_name,
)
from expt.run.record import parameters as _parameters
from expt.run.saved import recipe, signature
from expt.run.summary import plot_history, print_result
from expt.tracking.tracker import Tracker, open_tracker
from expt.training import checkpoint
from expt.training.batches import Examples, nbytes, place
from expt.training.callbacks import Callbacks
from expt.training.display import choose_display
from expt.training.evaluate import Kept, evaluate, predict
from expt.training.evaluate import figures as figures_of
from expt.training.interruption import Interruption, Stopped
from expt.training.loading import announcement
from expt.training.profiler import StepProfiler
from expt.training.ranks import OneRank, SeveralRanks
from expt.training.reading import sample_name
from expt.training.stopping import Ending
from expt.training.trainer import Trainer
from expt.units import counted
from expt.uri import without_password

if TYPE_CHECKING:
    from expt.run.features import CachedRun

log = logging.getLogger(__name__)
STEP_PHASES = ("forward", "backward", "optimizer_step")
"""Phases of a plan in which a training step has its peak."""


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
    ranks: OneRank = field(default_factory=OneRank)
    checkpoints: Path | None = None
    """The run's directory, where `context` has another one for what this process is not to write:
    of several that train together, the first one writes."""
    explain: Callable[[BaseException], BaseException] = lambda error: error
    """Returns the error to record, where one only follows from what happened elsewhere."""

    def __post_init__(self) -> None:
        self.source = self.data  # as it was built; `data` is what is trained on
        self.cached: CachedRun | None = None
        preset = self.settings.memory.preset
        self.recorder = Recorder(
            self.context.run_dir,
            _tracker(self.settings, self.context),
            RunResult(
                "failed",
                "error",
                preset=preset.value if preset else None,
                device=device_name(self.fabric.device),
                precision=str(self.fabric.strategy.precision.precision),
            ),
        )
        self.callbacks = Callbacks(build_callbacks(self.settings) if self.ranks.first else ())
        self.recorder.on_oom = self.callbacks.out_of_memory
        self.recorder.result.data_fingerprint = self.data.fingerprint()
        metrics = self.data.metrics
        monitor = monitored(metrics, self.settings.trainer.monitor)
        self.recorder.result.describe(metrics, monitor.name)
        self.recorder.plan(self.planned, self.budget.bytes if self.budget else None)
        device = self.fabric.device
        self.examples = Examples(self.data, device)  # one, so that a streamed sample is read once
        # The trials of a search are near their budget on purpose; their alarms are kept only.
        alone = self.settings.tracking.parent is None
        self.manager = manager_for(self.settings.memory, device, self.context.run_dir, alone)
        self.predict = (
            Planner(self.settings, None, "cuda", evaluation=False)
            if device.type == "cuda"
            else Planner(self.settings, self.data, "cpu", evaluation=False)
        )
        self.guard = MemoryGuard(
            self.settings.memory, self.budget, device, self.recorder, self.predict, self.ranks.count
        )
        if self.ranks.sharded:
            # The others are in the middle of what this one would take part in: it ends the run.
            self.guard.recovery.classify = lambda error: None

    def run(self, resuming: bool, extending: bool = False) -> RunResult:
        """Build, fit, test, record; a fault is recorded before it is raised again.

        With `extending`, a run that had come to its end goes on.
        """
        self.resuming, self.extending = resuming, extending
        exhausted: str | None = None
        with self._recorded():
            try:
                with self.guard.enforced(self.manager, self.planned) as self.meter:
                    if self.fabric.world_size > 1:  # the others would be further on by then
                        trainer = self._build()
                    else:
                        trainer = self.guard.recovery.retry_once(self._build, "build")
                    step = trainer.resume(extending) if resuming else 0
                    try:
                        self._begin(trainer, step, resuming)
                        self._conclude(trainer, trainer.fit())
                    finally:
                        trainer.batches.close()
                    del trainer
            except RecoveryError as error:
                if self.ranks.count > 1 and self.guard.recovery.alone:
                    raise  # the others know nothing of it: whoever watches them ends them
                exhausted = str(error)
            if exhausted is not None:
                self._give_up(exhausted)
        self.recorder.close()
        print_result(self.recorder.result, self.context.run_dir)
        self.callbacks.run_end(self.recorder.result)
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
            explained = self.explain(error)
            self._start()
            self.recorder.close_after(explained)
            self.callbacks.run_end(self.recorder.result, after_error=True)
            if explained is not error:
                raise explained from error
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
        preset = self.recorder.result.preset
        name = self._model_name() + (f"-{preset}" if preset else "")
        self.recorder.start(
            f"{name}-{self.context.run_dir.name}",
            {name: own for name, own in _parameters(resolved).items() if own is not None},
            {
                "model": self._model_name(),
                "data.fingerprint": str(self.recorder.result.data_fingerprint),
                **description(self.settings, self.context, self._model_name()),
                **self.context.fallback_of,
            },
        )
        if self.extending or load_launch(self.context.run_dir) is None:
            save_launch(self.context.run_dir, self.context.launch)
        if self.resuming:  # the result of the first part says nothing about a run that goes on
            (self.context.run_dir / FILE_NAME).unlink(missing_ok=True)
        for group, name in (("tracking", "uri"), ("search", "storage")):
            if resolved.get(group) and resolved[group][name]:
                resolved[group][name] = without_password(resolved[group][name])
        write_text(self.context.run_dir / CONFIG_NAME, OmegaConf.to_yaml(resolved), private=True)

    def _announce(self, trainer: Trainer) -> None:
        result = self.recorder.result
        print(
            f"{self._model_name()}, {result.parameters:,} parameters, {result.device}, "
            f"{result.precision}; {counted(trainer.steps_per_epoch, 'step')} an epoch, at most "
            f"{trainer.total_steps} in all; {self.context.run_dir}",
            flush=True,
        )
        self._say_what_is_not_exact(trainer)
        if self.ranks.sharded and self.settings.memory.recover:
            print(
                "note: trainer.strategy=fsdp: when memory runs out in one process, the others wait "
                "for its part of a layer, so there is no recovery, and the run ends; "
                "trainer.resume=true goes on from the last checkpoint",
                flush=True,
            )
        if trainer.batches.streamed:
            sample = self.examples.batch("train", 1)
            line = announcement(trainer.batches.settings, self.data.batch_size * nbytes(sample))
            if line:
                print(line, flush=True)

    def _judge_loading(self, trainer: Trainer) -> None:
        """Keep what was seen of the loader, and say so when training waited for it."""
        batches = trainer.batches
        if not batches.streamed:
            return
        batches.note_memory()
        self.recorder.result.loader = batches.figures.record(batches.settings)
        self.recorder.result.tuned = list(trainer.progress.tuned)
        cheaper = self.data.cheaper() if isinstance(self.data, Advising) else []
        verdict = batches.figures.verdict(batches.settings, cheaper)
        if verdict is not None:
            print(verdict, flush=True)

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
        model, optimizer, left = self._assembled()
        if isinstance(self.ranks, SeveralRanks):
            self.ranks.begin_alike(model, settings.trainer.seed)
        for owner in (self.data, bare(model)):
            if isinstance(owner, Cached):
                self.manager.on_cleanup(owner.clear)
        self.manager.knows(model, optimizer, self.data)
        counted_here = sum(weight.numel() for weight in model.parameters())
        self.recorder.result.parameters = counted_here + left
        return Trainer(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            data=self.data,
            settings=settings.trainer,
            recovery=self.guard.recovery,
            meter=self.meter,
            tracker=self.recorder.once,
            display=choose_display(settings.trainer.progress),
            interruption=self.interruption,
            manager=self.manager,
            profiler=self._profiler(),
            run_dir=self.checkpoints or self.context.run_dir,
            recipe=recipe(settings, self.source, Examples(self.source).input_names()),
            loader=settings.loader,
            callbacks=self.callbacks,
            budget_bytes=self.budget.bytes if self.budget else None,
            predicted_peak_bytes=self.recorder.result.memory["predicted_peak_bytes"],
            **self._after_epoch(),
            on_stage=self._in_stage,
            ranks=self.ranks,
        )

    def _in_stage(self, number: int) -> None:
        """Let recovery predict the stage that training is in."""
        self.predict.stage = number

    def _profiler(self) -> StepProfiler:
        if not self.settings.trainer.profile:
            return StepProfiler()
        from expt.training.trace_profiler import TraceProfiler

        return TraceProfiler(self.context.run_dir, self._predicted_of_steps())

    def _predicted_of_steps(self) -> int | None:
        """Return the peak that was predicted of training steps, without evaluation."""
        predicted: int | None = self.recorder.result.memory["predicted_peak_bytes"]
        if predicted is None or self.planned is None or self.planned.phase in STEP_PHASES:
            return predicted
        return self.predict(self.guard.recovery.techniques) if self.ranks.count == 1 else None

    def _first_weights(self) -> Callable[[nn.Module], None] | None:
        """Return what gives the model those of `trainer.start_from`, where it begins with any."""
        path = self.settings.trainer.start_from
        if path is None:
            return None
        folder = (self.checkpoints or self.context.run_dir) / checkpoint.FOLDER
        if (folder / checkpoint.LAST).exists():  # it has them, the frozen ones too
            return lambda model: checkpoint.keep(model, checkpoint.stored_names(folder))
        from expt.run.start import start_from

        return lambda model: print(start_from(model, path), flush=True)

    def _assembled(self) -> tuple[nn.Module, Optimizer, int]:
        """Return model and optimizer, and how many parameters are cached instead."""
        settings, fabric = self.settings, self.fabric
        self.data = self.source  # a second try begins with it again
        self.manager.knows(data=self.data)
        if settings.memory.cached_features is None:
            place(self.data, fabric.device)
            return *assemble(settings, fabric, self.data, self.examples, self._first_weights()), 0
        from expt.run.features import CachedRun

        cached = CachedRun(
            settings, fabric, self.source, self.guard.recovery, self.meter, self.context.run_dir
        )
        self.examples, first = Examples(self.source, fabric.device), self._first_weights()
        made = assemble(settings, fabric, self.source, self.examples, first, cached.install)
        self.cached, self.recorder.result.feature_cache = cached, cached.record
        self.data = cached.data
        self.examples = Examples(self.data, fabric.device)
        self._correct_the_plan(cached)
        return *made, cached.left_parameters

    def _correct_the_plan(self, cached: CachedRun) -> None:
        """Let the record compare what is measured with a plan of what is done."""
        settings, planned = self.settings, self.planned
        if self.data is self.source:  # there could be no cache
            memory = replace(settings.memory, feature_cache="off")
            self.predict.settings = replace(settings, memory=memory)
            self.recorder.result.memory["predicted_peak_bytes"] = None
        elif cached.record["reused"] and planned and planned.phase == "feature_cache":
            # What was planned is making the features, which are there.
            if self.ranks.sharded:  # the process group of a plan cannot be beside the real one
                self.recorder.result.memory["predicted_peak_bytes"] = None
                return
            training = plan_training(settings, self.data, planned.target)
            self.recorder.plan(training, self.budget.bytes if self.budget else None)
            if self.budget:
                self.manager.expect(expected_bytes(training, self.budget.bytes))

    def _after_epoch(self) -> dict[str, Any]:
        """Return the hooks of alternating epochs, where there are any."""
        alternation = None if self.cached is None else self.cached.alternation
        if alternation is None:
            return {}
        return {"after_epoch": alternation.after_epoch, "before_save": alternation.mark}

    def _conclude(self, trainer: Trainer, outcome: Ending) -> None:
        """Test if training ended as it should; the status is set when all of it went well."""
        recorder, result = self.recorder, self.recorder.result
        recorder.progress(trainer)
        if self.cached is not None:
            self.cached.note(trainer.progress.history)
        self._note_memory(trainer)
        if trainer.progress.history:
            self._note_part("val")
        self._judge_loading(trainer)
        if outcome.reason != "out_of_memory":  # else they may be half of a step on
            hashed = partial(checkpoint.weights_sha256, trainer.model)
            result.weights_sha256 = self.guard.recovery.retry_once(hashed, "conclusion")
        folder = self.context.run_dir / "plots"
        history, monitor = trainer.progress.history, trainer.monitor
        plots = drawn(lambda: plot_history(history, monitor, folder))
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
        for path in trainer.profiler.files:
            recorder.tracker.artifact(path, "profile")
        result.status, result.stop_reason = outcome.status, outcome.reason

    def _test(self, trainer: Trainer, outcome: Ending, folder: Path) -> tuple[Ending, list[Path]]:
        """Test the best weights once; a signal stops it, and a resumed run tests again."""
        load = partial(checkpoint.load_best, trainer.folder, self.fabric, trainer.model)
        self.guard.recovery.retry_once(load, "resume")
        keeping = trainer.settings.save_predictions
        metrics = evaluate(
            trainer.model,
            trainer.batches,
            "test",
            trainer.meter,
            trainer.settings.eval_batches,
            lambda: self.interruption.received is not None,
            self.guard.recovery,
            (lambda: Kept(self.data.accumulator())) if keeping else None,
        )
        self._note_memory(trainer)
        if metrics is None:
            return Ending("stopped", "signal", outcome.step), []
        recovery = self.guard.recovery
        compute = partial(recovery.retry_once, partial(figures_of, metrics), "conclusion")
        figures = self.ranks.from_first(compute)
        trainer.batches.share_skipped()
        self.recorder.result.metrics |= {f"test/{name}": value for name, value in figures.items()}
        self.recorder.result.skipped_samples = len(trainer.batches.skipped)
        self._note_part("test")
        self.callbacks.evaluation_end(trainer, "test", figures)
        with self.ranks.following(partial(predict, trainer.model, recovery=recovery)) as ask:
            if not self.ranks.first:
                return outcome, []  # it has predicted what the first one asked for
            return outcome, self._tested(trainer, metrics, ask, folder)

    def _tested(
        self, trainer: Trainer, metrics: Accumulator, ask: Callable[[Batch], Tensor], folder: Path
    ) -> list[Path]:
        """Write what was predicted, and draw it; return the plots."""
        if isinstance(metrics, Kept):
            from expt.training.predictions import FOLDER, formats, write_predictions

            path = self.context.run_dir / FOLDER / f"test.{formats(self.data)[0]}"
            write_predictions(trainer.batches, "test", metrics.predictions, path)
            self.recorder.tracker.artifact(path, FOLDER)
            metrics = metrics.inner
        batch = self.examples.batch("test", 1)
        path = self.context.run_dir / SIGNATURE_NAME
        inputs = Examples(self.source, self.fabric.device).batch("test", 1).inputs
        write_json(path, signature(inputs, ask(batch)))
        self.recorder.tracker.artifact(path, checkpoint.FOLDER)
        data = self.data
        return drawn(lambda: data.plots(ask, metrics, folder)) if isinstance(data, Plotted) else []

    def _note_memory(self, trainer: Trainer) -> None:
        """Take over the peaks measured so far: of several processes the largest, and each."""
        self.recorder.memory(trainer.meter)
        if self.ranks.count > 1:
            names = ("peak_allocated_bytes", "peak_reserved_bytes")
            own = {name: self.recorder.result.memory[name] for name in names}
            self.recorder.of_ranks(self.ranks.gathered(own))

    def _note_part(self, split: Split) -> None:
        """Mark a split of which only a part was evaluated."""
        batches, size = self.settings.trainer.eval_batches, self.data.size(split)
        self.recorder.result.partial.pop(split, None)
        if batches is not None and batches * self.data.eval_batch_size < size:
            words = f"{batches * self.data.eval_batch_size} of {size} samples"
            self.recorder.result.partial[split] = words
            self.recorder.tracker.tags({f"partial.{split}": words})
        elif self.resuming:  # an earlier part may have set it
            self.recorder.tracker.tags({f"partial.{split}": ""})

    def _model_name(self) -> str:
        return str(self.settings.arguments["model"]["_target_"]).rpartition(".")[2]


def _tracker(settings: Settings, context: RunContext) -> Tracker:
    """Return what the run is recorded with: MLflow's tracker, and loggers beside it."""
    first = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    if set(settings.tracking.loggers) <= {"mlflow"}:
        return first
    from expt.tracking.loggers import beside

    return beside(first, settings.tracking, context.run_dir)


def _set_deterministic(wanted: bool) -> None:
    """Allow or refuse non-deterministic kernels, also after another run in this process."""
    if wanted:
        # cuBLAS reads this when it starts (CUDA's documentation on reproducible results).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
