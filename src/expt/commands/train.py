"""`task=train`: train, validate, test, record. The main job.

This file decides whether there is anything to run, with which settings and inside which budget;
`expt.run.train` runs it: ``build -> fit -> test -> record``.
"""

from __future__ import annotations

import shlex

import torch
from omegaconf import DictConfig, OmegaConf

from expt.config.compose import typed
from expt.config.settings import RunContext, Settings
from expt.config.stages import stages_of
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import device_type
from expt.memory.recovery.attempt import release
from expt.result import CONFIG_NAME, LAUNCH_NAME, RunResult, load_result
from expt.run.batch_size import with_batch_found
from expt.run.build import build_training_data
from expt.run.fallback import check_entries, next_smaller, short_name, smaller_run
from expt.run.overflow import plan_before, too_small_for_weights, with_techniques
from expt.run.summary import print_result
from expt.run.train import TrainJob
from expt.tracking.tracker import close_left_open
from expt.training.checkpoint import FOLDER, read_progress
from expt.training.device import make_fabric
from expt.training.interruption import Interruption
from expt.training.stopping import limit_reached


def run(cfg: DictConfig, context: RunContext) -> RunResult:
    """Run one training and return how it ended.

    Raises:
        UserError: a problem in the configuration or the data; nothing was started.
        StorageError: the output directory refused a write.
        Stopped: SIGINT or SIGTERM; everything is saved and recorded.

    """
    with Interruption() as interruption:
        settings = validated(cfg, context.overridden)
        resuming = settings.trainer.resume is not False
        earlier = load_result(context.run_dir)
        if not resuming and (earlier is not None or (context.run_dir / LAUNCH_NAME).exists()):
            raise ConfigError(
                f"{context.run_dir} already holds a run; to go on with it, give "
                f"trainer.resume=true, else another folder as hydra.run.dir"
            )
        extending = False
        if earlier is not None and earlier.status == "completed":
            limit = _limit(context, settings)
            extending = limit is None
            if extending:
                _check_stages(context, settings)
            if not extending and not _untested(earlier, settings):
                return _completed(earlier, settings, context, limit)
        check_entries(settings, context)
        together = settings.trainer.devices > 1
        if together:  # of which each has a Fabric of its own
            device = torch.device(device_type(settings.trainer.device.value))
        else:
            fabric = make_fabric(settings.trainer.device, settings.memory.precision)
            device = fabric.device
        cfg, settings, context = with_batch_found(cfg, settings, context, device)
        data = build_training_data(settings)
        memory = settings.memory
        budget = None if memory.budget is None else Budget.parse(memory.budget, device)
        if together and budget is not None:
            budget = budget.of_ranks(settings.trainer.devices, device)
        refusal = None if budget is None else too_small_for_weights(budget, settings, data)
        if refusal is not None and next_smaller(settings, context) is None:
            raise ConfigError(refusal)
        settings, planned = plan_before(
            settings, data, device.type, budget.bytes if budget else None
        )
        cfg, context = with_techniques(cfg, settings, context)
        if together:
            from expt.run.ranks import Prepared, run_together

            del data  # each process reads its own
            ready = Prepared(cfg, settings, context, budget, planned, resuming, extending)
            return run_together(ready, interruption)
        job = TrainJob(cfg, settings, context, fabric, data, interruption, budget, planned)
        result = job.run(resuming, extending)
    if result.fallback_run is None:
        return result
    del data, job, planned
    release(device)  # the smaller run needs the room
    entry = next_smaller(settings, context)
    assert entry is not None
    print(f"memory.fallback: {short_name(entry)} takes over, in {result.fallback_run}")
    return run(*smaller_run(settings, context, entry, result))


def _check_stages(context: RunContext, settings: Settings) -> None:
    """Refuse more epochs for a completed run where they reach another stage of training.

    Its checkpoint has the optimizer of the weights that its own stages trained.
    """
    path, trainer = context.run_dir / CONFIG_NAME, settings.trainer
    before = OmegaConf.load(path) if path.exists() else OmegaConf.create()
    epochs = OmegaConf.select(before, "trainer.epochs", default=trainer.epochs)
    new = trainer.stages[len(stages_of(trainer.trainable, epochs)) :]
    if new:
        patterns = ",".join(new[0].patterns)
        raise ConfigError(
            f"trainer.epochs={trainer.epochs} reaches the stage of trainer.trainable that begins "
            f"with epoch {new[0].first_epoch}, which this run of {epochs} epochs was not made for; "
            f"train it as a run of its own: {typed('trainer.start_from', context.run_dir)} "
            f"{shlex.quote(f'trainer.trainable=[{patterns}]')} in another hydra.run.dir"
        )


def _untested(earlier: RunResult, settings: Settings) -> bool:
    """Tell whether a completed run was left untested, and a test is wanted now."""
    tested = any(
        value is not None for name, value in earlier.metrics.items() if name.startswith("test/")
    )
    return settings.trainer.test and not tested


LONGER = {
    "epochs": "trainer.epochs={epochs} is what it has done",
    "max_steps": "trainer.max_steps={max_steps} is what it has done",
    "time_limit": "trainer.time_limit_seconds={time_limit_seconds} is over",
    "early_stopping": "trainer.early_stopping_patience={early_stopping_patience} epochs went by "
    "without a better validation",
}
"""Why a completed run does not go on."""


def _limit(context: RunContext, settings: Settings) -> str | None:
    """Return which limit keeps a completed run from going on, None if none does."""
    progress = read_progress(context.run_dir / FOLDER)
    if progress is None:
        return "checkpoint"
    return limit_reached(progress.uncut(), settings.trainer)


def _completed(
    result: RunResult, settings: Settings, context: RunContext, limit: str | None
) -> RunResult:
    """Return the result of a run there is nothing left to do for, except to say so."""
    why = LONGER.get(str(limit), "it has no last checkpoint to go on from")
    print(
        f"{context.run_dir} is already completed; this is its result. It does not go on: "
        f"{why.format(**vars(settings.trainer))}; to train longer, give a larger one"
    )
    # It may have been killed between writing the result and hearing from the tracker.
    close_left_open(settings.tracking, context.run_dir, context.parent_dir, "FINISHED")
    print_result(result, context.run_dir)
    return result
