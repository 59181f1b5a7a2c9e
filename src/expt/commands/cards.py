"""`task=cards`: how to train the composed model on cards of 8 to 141 GiB, as a table.

The batch of an optimizer step is kept. For every card the first of these that is predicted to
fit is recommended: the whole batch at once; more and smaller micro-batches; then the same with
activation checkpointing; and where fp32 was asked for and does not fit, the same in bf16. What a
card has for tensors is its size less `cards.context_gib`; the peak may take `fit.margin` of that,
and what the allocator is predicted to reserve all of it. Predicted for CUDA, measured nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from expt.config.schema import Precision
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.files import write_json, write_text
from expt.job import DataSet
from expt.memory.planning.predict import Plan
from expt.memory.techniques.checkpointing import Checkpointing
from expt.run.batch_size import Limit, largest, predicted
from expt.run.build import build, techniques_of
from expt.run.planner import arithmetic, plan_training
from expt.tables import markdown_table, print_table
from expt.tracking.tracker import open_tracker
from expt.units import GIB, format_bytes

COLUMNS = (
    "card", "for tensors", "batch", "precision", "checkpointing", "peak", "reserved", "fits",
)  # fmt: skip


def cards_table(record: Mapping[str, Any]) -> Table:
    """Return one row per card."""
    table = Table(box=box.SIMPLE_HEAD, title=assumptions(record), title_justify="left")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if 2 <= number <= 4 else "right")
    for row in record["cards"]:
        table.add_row(*_cells(row), style=None if row["fits"] else "dim")
    return table


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the same table as Markdown."""
    rows = [COLUMNS, *(_cells(row) for row in record["cards"])]
    return f"{assumptions(record)}\n\n{markdown_table(rows)}"


def assumptions(record: Mapping[str, Any]) -> str:
    """Return what the table rests on, in a sentence."""
    return (
        f"Predicted for CUDA, a step's batch of {record['batch_size']} kept: micro-batch x "
        f"accumulation. For tensors: the card less {record['context_gib']:g} GiB for the CUDA "
        f"context; the peak may take {record['margin']:.0%} of it, what is reserved all of it."
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["fits"]:
        verdict = "yes"
    else:
        verdict = f"NO, by {format_bytes(row['excess_bytes'])}"
        if row["phase"] == "evaluation":
            verdict += " in evaluation (data.eval_batch_size, memory.forward_chunks)"
    checkpointing = row["activation_checkpointing"]
    return (
        f"{row['card_gib']:g} GiB",
        format_bytes(row["usable_bytes"]),
        f"{row['micro_batch']} x {row['gradient_accumulation']}",
        row["precision"],
        {True: "yes", False: "no"}.get(checkpointing, str(checkpointing)),
        format_bytes(row["peak_bytes"]),
        format_bytes(row["reserved_bytes"]),
        verdict,
    )


FILE_NAME, TABLE_NAME = "cards.json", "cards.md"


@dataclass(frozen=True)
class CardsResult:
    """The rows, as they stand in ``cards.json``."""

    record: dict[str, Any]
    exit_code: int = 0


@dataclass(frozen=True)
class Way:
    """How a step is computed, whatever the micro-batch."""

    precision: Precision
    checkpointing: Checkpointing


@dataclass
class Recommender:
    """Recommends for one card after another; a plan is made once."""

    settings: Settings
    data: DataSet
    _plans: dict[tuple[Way, int], Plan] = field(default_factory=dict)
    _ways: list[Way] = field(default_factory=list)

    def __post_init__(self) -> None:
        batch, now = self.data.batch_size, techniques_of(self.settings.memory)
        parts = [1]
        while parts[-1] < batch and not now.optimizer_in_backward:
            parts.append(min(2 * parts[-1], batch))
        self.parts = {-(-batch // count): count for count in reversed(parts)}
        """Micro-batches per step, by size, ascending."""
        self._ways = list(self._possible_ways())

    def row(self, size_gib: float) -> dict[str, Any]:
        """Return what to do on a card, or by how much the least does not fit."""
        usable = int((size_gib - self.settings.cards.context_gib) * GIB)
        limit = Limit(usable, self.settings.fit.margin)
        sizes = list(self.parts)
        for way in self._ways:
            best = largest(sizes, partial(self.plan, way), limit, sizes[-1]).best
            if best is not None:
                return self._row(size_gib, limit, way, best)
        least = min(
            ((way, size) for way in self._ways for size in sizes[:1]),
            key=lambda one: limit.demand(self.plan(*one)),
        )
        return self._row(size_gib, limit, *least)

    def plan(self, way: Way, size: int) -> Plan:
        """Return the plan of a way with a micro-batch of `size`."""
        if (way, size) not in self._plans:
            techniques = replace(
                techniques_of(self.settings.memory),
                gradient_accumulation=self.parts[size],
                activation_checkpointing=way.checkpointing,
            )
            make = partial(
                plan_training, self.settings, self.data, "cuda", techniques, way.precision
            )
            self._plans[way, size] = predicted(make)
        return self._plans[way, size]

    def _possible_ways(self) -> Iterator[Way]:
        memory = self.settings.memory
        precisions = [memory.precision]
        if arithmetic(memory.precision, "cuda") == "fp32":
            precisions.append(Precision.bf16)
        for precision in precisions:
            yield Way(precision, techniques_of(memory).activation_checkpointing)
            checkpointed = Way(precision, True)
            if memory.activation_checkpointing is not True and self._applies(checkpointed):
                yield checkpointed

    def _applies(self, way: Way) -> bool:
        """Tell whether the model has blocks that could be checkpointed."""
        try:
            self.plan(way, min(self.parts))
        except ConfigError:
            return False
        return True

    def _row(self, size_gib: float, limit: Limit, way: Way, size: int) -> dict[str, Any]:
        planned = self.plan(way, size)
        return {
            "card_gib": size_gib,
            "usable_bytes": limit.budget_bytes,
            "limit_bytes": limit.peak_bytes,
            "fits": limit.allows(planned),
            "excess_bytes": max(0, round(limit.demand(planned) - limit.budget_bytes)),
            "micro_batch": size,
            "gradient_accumulation": self.parts[size],
            "batch_size": self.data.batch_size,
            "precision": arithmetic(way.precision, "cuda"),
            "activation_checkpointing": way.checkpointing,
            "peak_bytes": planned.peak_bytes,
            "reserved_bytes": planned.reserved_bytes,
            "phase": planned.phase,
        }


def run(cfg: DictConfig, context: RunContext) -> CardsResult:
    """Recommend settings for every card.

    Raises:
        UserError: a problem in the configuration or the data.

    """
    settings = validated(cfg, context.overridden)
    data: DataSet = build(settings, "data")
    recommender = Recommender(settings, data)
    record = {
        "target": "cuda",
        "context_gib": settings.cards.context_gib,
        "margin": settings.fit.margin,
        "batch_size": data.batch_size,
        "cards": [recommender.row(size) for size in sorted(settings.cards.sizes_gib)],
    }
    print_table(cards_table(record))
    write_json(context.run_dir / FILE_NAME, record)
    write_text(context.run_dir / TABLE_NAME, as_markdown(record))
    print(f"files: {context.run_dir}")
    _record(settings, context, record)
    return CardsResult(record)


def _record(settings: Settings, context: RunContext, record: dict[str, Any]) -> None:
    """Send the peaks and the files to the tracker."""
    tracker = open_tracker(settings.tracking, context.run_dir, context.parent_dir)
    preset = settings.memory.preset
    name = f"cards-{preset.value if preset else 'lite'}-{context.run_dir.name}"
    tracker.start(name, {}, {"kind": "cards", "run_dir": str(context.run_dir)})
    peaks = {
        f"cards/peak_bytes_{row['card_gib']:g}gib": float(row["peak_bytes"])
        for row in record["cards"]
        if row["fits"]
    }
    tracker.metrics(peaks, 0)
    for file in (FILE_NAME, TABLE_NAME):
        tracker.artifact(context.run_dir / file)
    tracker.finish("FINISHED")
