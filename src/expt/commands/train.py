"""`task=train`: train, validate, test, record. The main job.

This file decides whether there is anything to run, with which settings and inside which budget;
`expt.run.train` runs it: ``build -> fit -> test -> record``.
"""

from __future__ import annotations

from omegaconf import DictConfig

from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.job import DataSet
from expt.memory.measuring.budget import Budget
from expt.memory.recovery.attempt import release
from expt.result import RunResult, load_launch, load_result
from expt.run.batch_size import with_batch_found
from expt.run.build import build
from expt.run.fallback import check_entries, next_smaller, short_name, smaller_run
from expt.run.overflow import plan_before, too_small_for_weights, with_techniques
from expt.run.summary import print_result
from expt.run.train import TrainJob
from expt.tracking.journal import is_closed
from expt.tracking.tracker import open_tracker
from expt.training.device import make_fabric
from expt.training.interruption import Interruption


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
        if not resuming and (earlier is not None or load_launch(context.run_dir) is not None):
            raise ConfigError(
                f"{context.run_dir} already holds a run; to go on with it, give "
                f"trainer.resume=true, else another folder as hydra.run.dir"
            )
        if (
            earlier is not None
            and earlier.status == "completed"
            and not _untested(earlier, settings)
        ):
            return _completed(earlier, settings, context)
        check_entries(settings, context)
        fabric = make_fabric(settings.trainer.device, settings.memory.precision)
        cfg, settings, context = with_batch_found(cfg, settings, context, fabric.device)
        data: DataSet = build(settings, "data")
        memory = settings.memory
        budget = None if memory.budget is None else Budget.parse(memory.budget, fabric.device)
        refusal = None if budget is None else too_small_for_weights(budget, settings, data)
        if refusal is not None and next_smaller(settings, context) is None:
            raise ConfigError(refusal)
        settings, planned = plan_before(
            settings, data, fabric.device.type, budget.bytes if budget else None
        )
        cfg, context = with_techniques(cfg, settings, context)
        job = TrainJob(cfg, settings, context, fabric, data, interruption, budget, planned)
        result = job.run(resuming)
    if result.fallback_run is None:
        return result
    del data, job, planned
    release(fabric.device)  # the smaller run needs the room
    entry = next_smaller(settings, context)
    assert entry is not None
    print(f"memory.fallback: {short_name(entry)} takes over, in {result.fallback_run}")
    return run(*smaller_run(settings, context, entry, result))


def _untested(earlier: RunResult, settings: Settings) -> bool:
    """Tell whether a completed run was left untested, and a test is wanted now."""
    tested = any(
        value is not None for name, value in earlier.metrics.items() if name.startswith("test/")
    )
    return settings.trainer.test and not tested


def _completed(result: RunResult, settings: Settings, context: RunContext) -> RunResult:
    """Return the result of a run there is nothing left to do for, except to say so."""
    print(
        f"{context.run_dir} is already completed; this is its result. Settings given now change "
        "nothing: to train longer, start another run."
    )
    if not is_closed(context.run_dir):
        # Killed between writing the result and hearing from the tracker.
        tracker = open_tracker(settings.tracking, context.run_dir)
        tracker.start(context.run_dir.name, {}, {})
        tracker.finish("FINISHED")
    print_result(result, context.run_dir)
    return result
