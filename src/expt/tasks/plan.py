"""`task=plan`: the peak memory of a training, predicted; nothing is trained, no GPU is needed.

Prints the breakdown and the changes that would save most, writes ``plan.json`` into the output
directory, and records both in the tracker. Under ``-m`` the jobs end in one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from expt.construction import RunContext, Settings, build
from expt.files import write_json
from expt.foresight import Saving, budget_bytes, plan_training, savings, target_of, target_remark
from expt.memory.measuring.device_memory import host_bytes
from expt.memory.planning.planning import Plan
from expt.plan_tables import plan_table
from expt.report import print_table
from expt.results import PLAN_NAME
from expt.tracking.opening import open_tracker
from expt.units import format_bytes
from expt.validation import validated


@dataclass(frozen=True)
class PlanResult:
    """What was predicted, as it stands in ``plan.json``."""

    record: dict[str, Any]
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> PlanResult:
    """Predict the peak of the configured training.

    Raises:
        UserError: a problem in the configuration or the data.

    """
    settings = validated(cfg, context.overridden)
    data = build(settings, "data")
    target = target_of(settings.trainer, settings.memory.target)
    if (remark := target_remark(settings.trainer, settings.memory.target)) is not None:
        print(remark)
    budget = budget_bytes(settings.memory.budget, target)
    planned = plan_training(settings, data, target)
    record = as_record(settings, planned, budget, savings(settings, data, planned))
    print_table(plan_table(record))
    if target == "cpu" and budget is None and planned.demand_bytes > host_bytes():
        print(f"that is more than this machine has: {format_bytes(host_bytes())}")
    for note in planned.notes:
        print(f"note: {note}")
    for saving in record["savings"]:
        saved = planned.peak_bytes - saving["peak_bytes"]
        print(
            f"would save: {saving['change']:44s} {format_bytes(saved)}, "
            f"leaving {format_bytes(saving['peak_bytes'])}"
        )
    write_json(context.run_dir / PLAN_NAME, record)
    print(f"files: {context.run_dir}")
    _record(settings, context, record)
    return PlanResult(record)


def as_record(
    settings: Settings, planned: Plan, budget: int | None, found: list[Saving]
) -> dict[str, Any]:
    """Return the content of ``plan.json``."""
    preset = settings.memory.preset
    return {
        **planned.as_dict(),
        "dominant": planned.dominant,
        "preset": preset.value if preset else None,
        "budget_bytes": budget,
        "fits": planned.fits(budget),
        "savings": [{"change": saving.change, "peak_bytes": saving.peak_bytes} for saving in found],
    }


def _record(settings: Settings, context: RunContext, record: dict[str, Any]) -> None:
    """Send the plan's figures and file to the tracker."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    name = f"plan-{record['preset'] or 'lite'}-{context.run_dir.name}"
    tracker.start(name, {}, {"kind": "plan", "run_dir": str(context.run_dir)})
    figures = {f"plan/{name}": float(count) for name, count in record["by_category"].items()}
    figures["plan/peak_bytes"] = float(record["peak_bytes"])
    figures["plan/seconds"] = record["seconds"]
    tracker.metrics(figures, 0)
    tracker.artifact(context.run_dir / PLAN_NAME)
    tracker.finish("FINISHED")
