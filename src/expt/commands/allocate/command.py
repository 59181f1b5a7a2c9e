"""`task=allocate`: what a memory budget goes to, and what fits into it.

The inverse of a plan: given the bytes, which micro-batch, accumulation, checkpointing, precision
and sizes (`scale` in the model's and the data's YAML); `expt.commands.allocate.allocator` looks.
Beside it the single changes of a checklist, and, where nothing fits, what would have to be given
up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from expt.commands.allocate.allocator import Allocator
from expt.commands.allocate.measures import single_changes
from expt.commands.allocate.several import over_cards
from expt.commands.allocate.tables import as_markdown, print_allocation
from expt.commands.allocate.variants import Variant, Variants
from expt.config.command_nodes import AllocateConfig
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.files import write_json, write_text
from expt.memory.planning.predict import Plan, Target
from expt.run.batch_size import Limit
from expt.run.target import arithmetic, budget_bytes, card_bytes, target_of, target_remark
from expt.tracking.tracker import open_tracker
from expt.units import format_bytes

FILE_NAME, TABLE_NAME = "allocation.json", "allocation.md"
BUDGETS = ("memory.budget", "memory.card")
"""Settings that are the limit, and not part of what is planned."""
CATEGORIES = ("parameters", "gradients", "optimizer_state", "activations", "inputs", "temporaries")


@dataclass(frozen=True)
class AllocationResult:
    """What was found, as it stands in ``allocation.json``."""

    record: dict[str, Any]
    exit_code: int = 0


def run(cfg: DictConfig, context: RunContext) -> AllocationResult:
    """Divide a budget over the configured training, and say what fits into it.

    Raises:
        UserError: a problem in the configuration or the data, or no budget.

    """
    settings = validated(cfg, context.overridden)
    own = cast(AllocateConfig, OmegaConf.to_object(cfg.allocate))
    if problems := own.problems():
        raise ConfigError(problems)
    target = target_of(settings.trainer, settings.memory.target)
    if (remark := target_remark(settings.trainer, settings.memory.target)) is not None:
        print(remark)
    budget = _budget(settings, target)
    allocator = Allocator(Variants.of_launch(context, target, BUDGETS), settings)
    limit = Limit.of(budget, settings.fit.margin, target)
    record = Answer(allocator, limit).record()
    record["several"] = over_cards(allocator, limit, own.devices)
    print_allocation(record)
    write_json(context.run_dir / FILE_NAME, record)
    write_text(context.run_dir / TABLE_NAME, as_markdown(record))
    print(f"files: {context.run_dir}")
    _track(settings, context, record)
    return AllocationResult(record, 0 if record["fits"] else 1)


class Answer:
    """What a budget goes to, as plain values.

    Args:
        allocator: looks for what fits.
        limit: what may be taken of the budget.

    """

    def __init__(self, allocator: Allocator, limit: Limit) -> None:
        self.allocator, self.limit = allocator, limit
        self.variants = allocator.variants

    def record(self) -> dict[str, Any]:
        """Return what was found.

        Raises:
            ConfigError: the configuration itself cannot be planned.

        """
        now = self.variants()
        as_is = now.plan()
        found = self.allocator.find(self.limit)
        choice = found.choice
        variant, planned = self.variants(choice.way), choice.planned
        return {
            "target": self.variants.target,
            "budget_bytes": self.limit.budget_bytes,
            "margin": self.limit.margin,
            "fits": choice.fits,
            "now": self._row(now, now.micro_batch, as_is),
            "chosen": {
                **self._row(variant, choice.micro_batch, planned),
                "changes": self.allocator.command(choice),
                "by_category": self._division(planned),
                "excess_bytes": max(0, round(self.limit.demand(planned) - self.limit.budget_bytes)),
            },
            "emergency": [given.as_dict() for given in found.given_up],
            "checklist": self._checklist(now, as_is),
            "handbook": formulas(variant, planned),
        }

    def _checklist(self, now: Variant, as_is: Plan) -> list[dict[str, Any]]:
        """Return the single changes and what each would save, most useful first."""
        rows = []
        for measure in single_changes(now, self.allocator.dimensions):
            planned = self.variants.planned(measure.changes)
            if isinstance(planned, str):
                continue
            saved = self.limit.taken(as_is) - self.limit.taken(planned)
            if not saved:
                continue
            rows.append(
                measure.as_dict()
                | {
                    "peak_bytes": planned.peak_bytes,
                    "saved_bytes": saved,
                    "fits": self.limit.allows(planned),
                }
            )
        return sorted(rows, key=lambda row: -row["saved_bytes"])

    def _row(self, variant: Variant, micro_batch: int, planned: Plan) -> dict[str, Any]:
        settings, operations = variant.settings, variant.operations
        return {
            "micro_batch": micro_batch,
            "gradient_accumulation": variant.parts.get(
                micro_batch, settings.memory.gradient_accumulation
            ),
            "batch_size": variant.data.batch_size,
            "precision": arithmetic(settings.memory.precision, self.variants.target),
            "activation_checkpointing": settings.memory.activation_checkpointing,
            "sizes": {name: value_of(settings, name) for name in self.allocator.dimensions},
            "peak_bytes": planned.peak_bytes,
            "taken_bytes": self.limit.taken(planned),
            "used": self.limit.taken(planned) / self.limit.budget_bytes,
            "fits": self.limit.allows(planned),
            "phase": planned.phase,
            "gflops_per_sample": None if operations is None else operations / 1e9,
        }

    def _division(self, planned: Plan) -> dict[str, int]:
        found = {name: int(planned.by_category.get(name, 0)) for name in CATEGORIES}
        rest = planned.peak_bytes - sum(found.values())
        taken = self.limit.taken(planned)
        return {
            **found,
            "other": rest,
            "reserved by the allocator": max(0, taken - planned.peak_bytes),
            "headroom": self.limit.budget_bytes - max(taken, planned.peak_bytes),
        }


def formulas(variant: Variant, planned: Plan) -> dict[str, int]:
    """Return the handbook's formulas for the chosen configuration, as a check of the plan."""
    model = variant.model
    weights = {id(weight): weight for weight in model.parameters()}.values()
    trained = [weight for weight in weights if weight.requires_grad]
    name = str(variant.settings.arguments["optimizer"]["_target_"])
    moments = 2 if "Adam" in name else 1 if "SGD" in name else 0
    sizes = {"AdamW8bit": 1}
    per_value = sizes.get(name.rpartition(".")[2])
    return {
        "parameters": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.nbytes for weight in trained),
        "optimizer_state": sum(
            moments * weight.numel() * (per_value or weight.element_size()) for weight in trained
        ),
    }


def value_of(settings: Settings, name: str) -> Any:
    """Return the value of a setting, given as ``model.rank`` or ``data.pixels``."""
    group, _, argument = name.partition(".")
    return settings.arguments[group].get(argument)


def _budget(settings: Settings, target: Target) -> int:
    found = budget_bytes(settings.memory.budget, target)
    if found is None:
        found = card_bytes(settings.memory.card, target) if settings.memory.card else None
    if found is None:
        raise ConfigError(
            "task=allocate divides a budget, and there is none; give memory.budget=24GiB"
            + (", or memory.card=24GiB for what CUDA leaves of a card" if target == "cuda" else "")
        )
    return found


def _track(settings: Settings, context: RunContext, record: dict[str, Any]) -> None:
    """Send the figures and the files to the tracker."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    name = (
        f"allocate-{format_bytes(record['budget_bytes']).replace(' ', '')}-{context.run_dir.name}"
    )
    tracker.start(name, {}, {"kind": "allocate", "run_dir": str(context.run_dir)})
    chosen = record["chosen"]
    tracker.metrics(
        {
            "allocate/peak_bytes": float(chosen["peak_bytes"]),
            "allocate/used": float(chosen["used"]),
            "allocate/micro_batch": float(chosen["micro_batch"]),
        },
        0,
    )
    for file in (FILE_NAME, TABLE_NAME):
        tracker.artifact(context.run_dir / file)
    tracker.finish("FINISHED")
