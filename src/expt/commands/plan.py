"""`task=plan`: the peak memory of a training, predicted; nothing is trained, no GPU is needed.

Prints the breakdown and the changes that would save most, writes ``plan.json`` into the output
directory, and records both in the tracker. Under ``-m`` the jobs end in one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.files import write_json
from expt.memory.measuring.device_memory import host_bytes
from expt.memory.planning.plan import CUDA_FAILURES
from expt.memory.planning.predict import Plan
from expt.result import PLAN_NAME
from expt.run.build import build
from expt.run.gotchas import gotchas
from expt.run.planner import Planner, spelled_out
from expt.run.savings import Saving, savings
from expt.run.stages import stage_lines
from expt.run.target import budget_bytes, card_bytes, target_of, target_remark
from expt.tables import markdown_table, print_table
from expt.tracking.tracker import open_tracker
from expt.units import format_bytes

MODULE_ROWS = 8
COLUMNS = ("job", "preset", "device", "predicted peak", "interval", "reserved", "mostly", "fits")


def plan_table(record: Mapping[str, Any]) -> Table:
    """Return a plan's peak by category and by module."""
    table = Table(box=box.SIMPLE_HEAD, title=headline(record), title_justify="left")
    table.add_column("at the peak")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    peak = record["peak_bytes"]
    for name, count in sorted(record["by_category"].items(), key=lambda item: -item[1]):
        table.add_row(name, format_bytes(count), f"{100 * count / peak:.1f} %")
    table.add_section()
    for name, count in list(record["by_module"].items())[:MODULE_ROWS]:
        table.add_row(name, format_bytes(count), f"{100 * count / peak:.1f} %", style="dim")
    for name, count in record["corrections"].items():
        table.add_row(f"correction: {name}", format_bytes(count), "", style="dim")
    if (captured := record.get("captured_reserved_bytes")) is not None:
        more = captured - record["reserved_bytes"]
        name = "reserved, more as a CUDA graph (trainer.compile)"
        table.add_row(name, format_bytes(max(more, 0)), "", style="dim")
    return table


def headline(record: Mapping[str, Any]) -> str:
    """Return the plan in one line."""
    line = f"predicted peak on {record['target']}: {spelled_out(record)}"
    verdict = {True: "fits", False: "does NOT fit", None: "may or may not fit"}
    if record["budget_bytes"] is not None:
        line += f"; {verdict[record['fits']]} the budget of {format_bytes(record['budget_bytes'])}"
    elif record.get("card_bytes") is not None:
        line += f"; {verdict[record['fits']]} the card's {format_bytes(record['card_bytes'])}"
    return line


def compared_words(planned: Plan) -> str:
    """Return what is compared with a budget, and how sure that is."""
    if planned.reserved_bytes is None:
        return ""
    return (
        f"compared is what the allocator reserves, with {planned.margin:.0%} beside it: with that "
        f"margin at most {CUDA_FAILURES:.0%} of published GPU runs would run out of memory"
    )


def comparison_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return plans side by side, one row each."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 3 else "right")
    for name, record in records.items():
        table.add_row(*_cells(name, record))
    return table


def comparison_markdown(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the same table as Markdown."""
    return markdown_table([COLUMNS, *(_cells(name, record) for name, record in records.items())])


def _cells(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = record["interval_bytes"]
    reserved = record["reserved_bytes"]
    return (
        name,
        record["preset"] or "-",
        record["target"],
        format_bytes(record["peak_bytes"]),
        f"{format_bytes(low)} to {'?' if high is None else format_bytes(high)}",
        "-" if reserved is None else format_bytes(reserved),
        record["dominant"].replace("_", " "),
        {True: "yes", False: "NO", None: "-"}[record["fits"]],
    )


@dataclass(frozen=True)
class PlanResult:
    """What was predicted, as it stands in ``plan.json``."""

    record: dict[str, Any]
    exit_code: int = 0

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        return int(self.record["peak_bytes"])


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
    planner = Planner(settings, data, target)
    planned = planner.plan()
    card = card_bytes(settings.memory.card, target)
    record = as_record(settings, planned, budget, savings(planner), card)
    told = gotchas(planner)
    record["gotchas"] = [gotcha.as_dict() for gotcha in told]
    print_table(plan_table(record))
    if target == "cpu" and budget is None and planned.demand_bytes > host_bytes():
        print(f"that is more than this machine has: {format_bytes(host_bytes())}")
    if record["fits"] is not None and (words := compared_words(planned)):
        print(words)
    for line in (*stage_lines(record["stages"]), *(f"note: {note}" for note in planned.notes)):
        print(line)
    for gotcha in told:
        print(gotcha.line())
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
    settings: Settings,
    planned: Plan,
    budget: int | None,
    found: list[Saving],
    card: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``plan.json``; without a budget the card's memory is compared."""
    preset = settings.memory.preset
    return {
        **planned.as_dict(),
        "dominant": planned.dominant,
        "preset": preset.value if preset else None,
        "ranks": settings.trainer.devices,
        "budget_bytes": budget,
        "card_bytes": card,
        "fits": planned.fits(card if budget is None else budget),
        "margin": planned.margin,
        "savings": [{"change": saving.change, "peak_bytes": saving.peak_bytes} for saving in found],
    }


def _record(settings: Settings, context: RunContext, record: dict[str, Any]) -> None:
    """Send the plan's figures and file to the tracker."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    preset = f"{record['preset']}-" if record["preset"] else ""
    name = f"plan-{preset}{context.run_dir.name}"
    tracker.start(name, {}, {"kind": "plan", "run_dir": str(context.run_dir)})
    figures = {f"plan/{name}": float(count) for name, count in record["by_category"].items()}
    figures["plan/peak_bytes"] = float(record["peak_bytes"])
    figures["plan/seconds"] = record["seconds"]
    tracker.metrics(figures, 0)
    tracker.artifact(context.run_dir / PLAN_NAME)
    tracker.finish("FINISHED")
