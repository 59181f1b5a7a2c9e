"""`task=fit_batch`: the largest micro-batch that fits the budget, and the command line to use.

By prediction first; where the device is here, two real steps under the enforced budget confirm
it (`fit.confirm`). The batch of an optimizer step stays `data.batch_size`, in as many micro-batches
as it takes. The answer is printed, written to ``fit.json``, and recorded in the tracker.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from rich import box
from rich.table import Table
from torch import nn

from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.files import write_json
from expt.job import DataSet
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.meter import meter_for
from expt.memory.planning.predict import Target
from expt.memory.recovery.attempt import Success, attempt, release, shortage
from expt.memory.recovery.recovery import Recovery
from expt.run.batch_size import Fit, Limit, fit, with_batch_size
from expt.run.build import assemble, build_training_data, techniques_of
from expt.run.overflow import too_small_for_weights
from expt.run.savings import MAX_CHUNKS
from expt.run.target import arithmetic, budget_bytes, target_of, target_remark
from expt.tables import print_table
from expt.tracking.tracker import NullTracker, open_tracker
from expt.training.batches import place
from expt.training.device import make_fabric
from expt.training.display import SilentDisplay
from expt.training.evaluate import evaluate
from expt.training.interruption import Interruption
from expt.training.profiler import StepProfiler
from expt.training.trainer import Trainer
from expt.units import format_bytes
from expt.uri import shown_lines

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
    """Do the steps; `data` is on the device afterwards.

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
    install: Callable[[nn.Module], None] | None = None
    if memory.cached_features is not None:
        from expt.run.feature_plans import stand_in

        target: Target = "cuda" if fabric.device.type == "cuda" else "cpu"
        data, install = stand_in(settings, data, target, arithmetic(memory.precision, target))

    def work() -> Confirmation:
        with budget.enforce(fabric.device) as ledger:
            meter = meter_for(fabric.device, ledger)
            fabric.seed_everything(settings.trainer.seed, verbose=False)
            place(data, fabric.device)
            model, optimizer = assemble(settings, fabric, data, install=install)
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
                loader=settings.loader,
            )
            trainer.full_batch = micro_batch * parts
            samples = trainer.batches.of(torch.arange(trainer.full_batch) % data.size("train"))
            model.train()
            for _ in range(STEPS):
                trainer.train_step(samples)
            evaluate(model, trainer.batches, "val", meter, max_batches=1)
            trainer.batches.close()
            return Confirmation(True, meter.peak_allocated_bytes(), meter.peak_reserved_bytes())

    outcome = attempt(work, shortage)
    release(fabric.device)
    if isinstance(outcome, Success):
        return outcome.value
    return Confirmation(False, None, None)


FILE_NAME = "fit.json"
NOT_REPEATED = re.compile(
    r"[+~]*(task|fit\..*|trainer\.resume|data\.batch_size|memory\.gradient_accumulation)="
)
"""Arguments of this command line that the recommended one does not take over."""


@dataclass(frozen=True)
class FitResult:
    """What was found, as it stands in ``fit.json``."""

    record: dict[str, Any]
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> FitResult:
    """Find the largest micro-batch for the configured training.

    Raises:
        UserError: a problem in the configuration or the data; not even one sample fits.

    """
    settings = validated(cfg, context.overridden)
    batch_size = None if settings.batch_is_auto else int(settings.arguments["data"]["batch_size"])
    settings = with_batch_size(settings, batch_size or 1)
    data = build_training_data(settings)
    target = target_of(settings.trainer, settings.memory.target)
    budget = budget_for(settings, target)
    if (remark := target_remark(settings.trainer, settings.memory.target)) is not None:
        print(remark)
    refusal = too_small_for_weights(budget, settings, data)
    if refusal is not None:
        raise ConfigError(refusal)
    found = fit(settings, data, target, budget.bytes, batch_size)
    limit = Limit.of(budget.bytes, settings.fit.margin, target)
    print_table(fit_table(found, limit))
    confirmation = _confirmed(settings, data, target, budget, found, context.run_dir)
    record = {
        **as_record(found, limit, confirmation),
        "command": command(context.launch, found, batch_size),
    }
    for line in remarks(record, slices(settings.memory.forward_chunks, data.eval_batch_size)):
        print(line)
    print(f"use: {record['command']}")
    write_json(context.run_dir / FILE_NAME, record)
    print(f"files: {context.run_dir}")
    _record(settings, context, record)
    return FitResult(record)


def budget_for(settings: Settings, target: Target) -> Budget:
    """Return the budget to fit into: the one given, or what is free on the device.

    Raises:
        ConfigError: none is given, and the device is not here.

    """
    value = settings.memory.budget
    if value is None:
        if target == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "memory.budget is not set, and there is no CUDA device here whose free memory "
                "could take its place; give an amount, like memory.budget=24GiB, or "
                "trainer.device=cpu"
            )
        value = "auto"
    count = budget_bytes(value, target)
    assert count is not None
    return Budget(count, str(value))


def as_record(found: Fit, limit: Limit, confirmation: Confirmation | str) -> dict[str, Any]:
    """Return the content of ``fit.json``, without the command."""
    done = confirmation if isinstance(confirmation, Confirmation) else None
    return {
        "target": found.planned.target,
        "budget_bytes": limit.budget_bytes,
        "margin": limit.margin,
        "limit_bytes": limit.allowed_bytes,
        "micro_batch": found.micro_batch,
        "gradient_accumulation": found.gradient_accumulation,
        "batch_size": found.batch_size,
        "limited_by": found.limited_by,
        "predicted": found.planned.as_dict(),
        "traced": [
            {
                "micro_batch": size,
                "peak_bytes": planned.peak_bytes,
                "reserved_bytes": planned.reserved_bytes,
                "phase": planned.phase,
                "fits": limit.allows(planned),
            }
            for size, planned in found.plans.items()
        ],
        "confirmed": done.fits if done else None,
        "not_confirmed_because": None if done else confirmation,
        "measured_peak_bytes": done.peak_bytes if done else None,
        "measured_reserved_bytes": done.reserved_bytes if done else None,
    }


def fit_table(found: Fit, limit: Limit) -> Table:
    """Return every micro-batch that was traced."""
    title = (
        f"micro-batches on {found.planned.target}, budget {format_bytes(limit.budget_bytes)}, "
        f"of which {found.planned.demand_words} may take {limit.margin:.1%}: "
        f"{format_bytes(limit.allowed_bytes)}"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("micro-batch", "predicted peak", "reserved", "in", "fits"):
        table.add_column(name, justify="left" if name == "in" else "right")
    for size, planned in found.plans.items():
        chosen = size == found.micro_batch
        table.add_row(
            str(size),
            format_bytes(planned.peak_bytes),
            "-" if planned.reserved_bytes is None else format_bytes(planned.reserved_bytes),
            planned.phase.replace("_", " "),
            "yes, the largest" if chosen else "yes" if limit.allows(planned) else "no",
            style="bold" if chosen else None,
        )
    return table


def slices(now: int, eval_batch_size: int) -> int | None:
    """Return more slices of a batch of evaluation than now, None where it has no more samples."""
    more = min(max(MAX_CHUNKS, 2 * now), eval_batch_size)
    return more if more > now else None


def remarks(record: Mapping[str, Any], more_slices: int | None = None) -> list[str]:
    """Return what the table does not say; `more_slices` would make evaluation smaller."""
    size, batch = record["micro_batch"], record["batch_size"]
    parts, predicted = record["gradient_accumulation"], record["predicted"]
    lines = [f"largest micro-batch: {size} (limited by {record['limited_by']})"]
    if size > batch:
        lines.append(
            f"the batch of {batch} fits whole; there is room for {size}, which would be another "
            "training (see the learning rate)"
        )
    else:
        lines.append(f"a step's batch of {batch} in {parts} part{'s' if parts > 1 else ''}")
    if predicted["phase"] == "evaluation":
        other = "" if more_slices is None else f" or memory.forward_chunks={more_slices}"
        lines.append(
            f"the peak is that of evaluation; a smaller data.eval_batch_size{other} would lower it"
        )
    if predicted["method"] == "estimate":
        lines.append("the model could not be traced: the peak is a weaker estimate")
    if record["confirmed"]:
        measured, expected = record["measured_peak_bytes"], predicted["peak_bytes"]
        lines.append(
            f"confirmed by two steps inside the budget: measured {format_bytes(measured)}, "
            f"predicted {format_bytes(expected)} ({expected / measured - 1:+.1%})"
        )
    elif record["confirmed"] is None:
        lines.append(f"not confirmed by real steps: {record['not_confirmed_because']}")
    else:
        lines.append(
            "NOT confirmed: two real steps ran out of memory inside the budget, so the prediction "
            "is too low here; try a smaller fit.margin"
        )
    return lines


def command(launch: Mapping[str, Any], found: Fit, batch_size: int | None) -> str:
    """Return the command line that trains with what was found, and this one's other settings."""
    given = shown_lines(launch.get("overrides", []))
    words = [line for line in given if not NOT_REPEATED.match(line)]
    own = [line for line in given if re.match(r"\+*data\.batch_size=", line)]
    if batch_size == found.batch_size:
        words += own
    else:
        words.append(f"data.batch_size={found.batch_size}")
    words.append(f"memory.gradient_accumulation={found.gradient_accumulation}")
    folder = launch.get("config_dir")
    words = [f"--config-dir={folder}", *words] if folder else words
    return " ".join(["python -m expt", *map(shlex.quote, words)])


def _confirmed(
    settings: Settings,
    data: DataSet,
    target: Target,
    budget: Budget,
    found: Fit,
    run_dir: Path,
) -> Confirmation | str:
    """Take the confirming steps, or return why not."""
    if not settings.fit.confirm:
        return "fit.confirm=false"
    if target == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    if fabric.device.type != target:
        return f"the run's device is {fabric.device.type}, the prediction is for {target}"
    accumulated = found.gradient_accumulation > 1
    return confirm(settings, fabric, data, found.micro_batch, accumulated, budget, run_dir)


def _record(settings: Settings, context: RunContext, record: dict[str, Any]) -> None:
    """Send the figures and the file to the tracker."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    preset = settings.memory.preset
    name = f"fit-{preset.value if preset else 'lite'}-{context.run_dir.name}"
    tracker.start(name, {}, {"kind": "fit_batch", "run_dir": str(context.run_dir)})
    figures = {
        "fit/micro_batch": float(record["micro_batch"]),
        "fit/gradient_accumulation": float(record["gradient_accumulation"]),
        "fit/budget_bytes": float(record["budget_bytes"]),
        "fit/peak_bytes": float(record["predicted"]["peak_bytes"]),
    }
    if record["measured_peak_bytes"] is not None:
        figures["fit/measured_peak_bytes"] = float(record["measured_peak_bytes"])
    tracker.metrics(figures, 0)
    tracker.artifact(context.run_dir / FILE_NAME)
    tracker.finish("FINISHED")
