"""`task=cards`: how to train the composed model on cards of 8 to 141 GiB, as a table.

`task=allocate`, for one card after the other, with the plans in common. The batch of an optimizer
step is kept. What a card has for tensors is its size less `cards.context_gib`; what the allocator
is predicted to reserve there may take `fit.margin` of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from expt.commands.allocate.allocator import Allocator
from expt.commands.allocate.command import BUDGETS, value_of
from expt.commands.allocate.variants import Variants
from expt.config.compose import key
from expt.config.settings import RunContext, Settings
from expt.config.validate import validated
from expt.files import write_json, write_text
from expt.memory.planning.plan import CUDA_FAILURES
from expt.run.batch_size import MARGINS, Limit
from expt.run.target import arithmetic
from expt.tables import markdown_table, print_table
from expt.tracking.tracker import open_tracker
from expt.units import GIB, format_bytes

COLUMNS = (
    "card", "for tensors", "batch", "precision", "checkpointing", "peak", "reserved", "used",
    "fits",
)  # fmt: skip
IN_COLUMNS = (
    "memory.gradient_accumulation", "memory.precision", "memory.activation_checkpointing",
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
    failing = ""
    if record["margin"] <= MARGINS["cuda"]:
        failing = f", with which at most {CUDA_FAILURES:.0%} of published runs would run out"
    return (
        f"Predicted for CUDA, a step's batch of {record['batch_size']} kept: micro-batch x "
        f"accumulation. For tensors: the card less {record['context_gib']:g} GiB for the CUDA "
        f"context; what is reserved may take {record['margin']:.1%} of it{failing}."
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    checkpointing = row["activation_checkpointing"]
    return (
        f"{row['card_gib']:g} GiB",
        format_bytes(row["usable_bytes"]),
        f"{row['micro_batch']} x {row['gradient_accumulation']}",
        row["precision"],
        {True: "yes", False: "no"}.get(checkpointing, str(checkpointing)),
        format_bytes(row["peak_bytes"]),
        format_bytes(row["reserved_bytes"]),
        f"{row['used']:.0%}",
        _verdict(row),
    )


def _verdict(row: Mapping[str, Any]) -> str:
    """Return whether it fits, and with which changes besides those that have a column."""
    changed = " ".join(line for line in row["changes"] if key(line) not in IN_COLUMNS)
    if row["fits"]:
        return f"yes, with {changed}" if changed else "yes"
    verdict = f"NO, by {format_bytes(row['excess_bytes'])}"
    if row["phase"] == "evaluation":
        verdict += " in evaluation (data.eval_batch_size, memory.forward_chunks)"
    return f"{verdict}, with {changed}" if changed else verdict


FILE_NAME, TABLE_NAME = "cards.json", "cards.md"


@dataclass(frozen=True)
class CardsResult:
    """The rows, as they stand in ``cards.json``."""

    record: dict[str, Any]
    exit_code: int = 0


def card_row(allocator: Allocator, size_gib: float, context_gib: float) -> dict[str, Any]:
    """Return what to do on a card, or by how much the least does not fit."""
    settings, variants = allocator.settings, allocator.variants
    usable = int((size_gib - context_gib) * GIB)
    limit = Limit.of(usable, settings.fit.margin, "cuda")
    found = allocator.find(limit)
    choice, planned = found.choice, found.choice.planned
    variant = variants(choice.way)
    memory = variant.settings.memory
    return {
        "card_gib": size_gib,
        "usable_bytes": usable,
        "limit_bytes": limit.allowed_bytes,
        "fits": choice.fits,
        "excess_bytes": max(0, round(limit.demand(planned) - usable)),
        "micro_batch": choice.micro_batch,
        "gradient_accumulation": variant.parts[choice.micro_batch],
        "batch_size": variant.data.batch_size,
        "precision": arithmetic(memory.precision, "cuda"),
        "activation_checkpointing": memory.activation_checkpointing,
        "sizes": {name: value_of(variant.settings, name) for name in allocator.dimensions},
        "given_up": [given.measure.about for given in found.given_up if given.kept],
        "changes": allocator.command(choice),
        "peak_bytes": planned.peak_bytes,
        "reserved_bytes": planned.within(limit.allowed_bytes).reserved_bytes,
        "used": limit.taken(planned) / usable,
        "phase": planned.phase,
    }


def run(cfg: DictConfig, context: RunContext) -> CardsResult:
    """Recommend settings for every card.

    Raises:
        UserError: a problem in the configuration or the data.

    """
    settings = validated(cfg, context.overridden)
    allocator = Allocator(Variants.of_launch(context, "cuda", BUDGETS), settings)
    batch_size = allocator.variants().data.batch_size
    record = {
        "target": "cuda",
        "context_gib": settings.cards.context_gib,
        "margin": Limit.of(0, settings.fit.margin, "cuda").margin,
        "batch_size": batch_size,
        "cards": [
            card_row(allocator, size, settings.cards.context_gib)
            for size in sorted(settings.cards.sizes_gib)
        ],
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
