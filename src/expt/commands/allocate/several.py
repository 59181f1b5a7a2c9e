"""The same training on several cards: sharded over them, or its blocks laid on one after the other.

Sharded is `trainer.strategy=fsdp`, planned as one of the ranks. Laid out is what libraries for
pipelines do; this program plans it and does not train it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from expt.commands.allocate.allocator import Allocator
from expt.commands.allocate.variants import Changes, Variants
from expt.errors import ConfigError
from expt.memory.planning.blocks import Blocks
from expt.run.allocation import Choice
from expt.run.batch_size import Limit

log = logging.getLogger(__name__)


def over_cards(allocator: Allocator, limit: Limit, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each count of cards, as plain values; a limit is of each card.

    Raises:
        ConfigError: the configuration itself cannot be planned.

    """
    if not counts:
        return []
    choice, blocks = _blocks(allocator, limit)
    return [
        {
            "cards": count,
            "sharded": _sharded(allocator, limit, count),
            "split": _split(allocator, limit, count, choice, blocks),
        }
        for count in counts
    ]


def _sharded(allocator: Allocator, limit: Limit, count: int) -> dict[str, Any]:
    """Return what a rank of a sharded training takes, with the best way that fits."""
    lines = (f"trainer.devices={count}", "trainer.strategy=fsdp")
    variants = Variants((*allocator.variants.base, *lines), allocator.variants.target)
    try:
        ranks = Allocator(variants, variants().settings)
        found = ranks.largest(limit)
    except ConfigError as error:
        return {"refused": " ".join(str(error).split())[:300]}
    except Exception as error:  # a user's model may do anything in parts
        log.info("no prediction over %s cards", count, exc_info=True)
        return {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {
        "peak_bytes": found.planned.peak_bytes,
        "fits": found.fits,
        "changes": [*lines, *ranks.command(found)],
        "micro_batch": found.micro_batch,
    }


def _blocks(allocator: Allocator, limit: Limit) -> tuple[Choice[Changes], Blocks | None]:
    """Return the way that fits or takes least, sample by sample, and its blocks."""
    way = allocator.largest(limit).way
    variant = allocator.variants(way)
    micro_batch = min(variant.parts)
    techniques = replace(variant.planner.now, gradient_accumulation=variant.parts[micro_batch])
    planned = variant.plan(micro_batch)
    return Choice(way, micro_batch, planned, False), variant.planner.blocks(techniques)


def _split(
    allocator: Allocator, limit: Limit, count: int, choice: Choice[Changes], blocks: Blocks | None
) -> dict[str, Any]:
    """Return what each card takes with blocks laid one after the other."""
    if blocks is None:
        return {"refused": "the step could not be traced, so that its blocks are not known"}
    found = blocks.split(count)
    # What is reserved on a card, and libraries' workspaces, as much as for all blocks on one.
    more = limit.taken(choice.planned) / sum(blocks.split(1).peak_bytes)
    return {
        "peak_bytes": found.largest_bytes,
        "fits": found.largest_bytes * more <= limit.allowed_bytes,
        "changes": allocator.command(choice),
        "micro_batch": choice.micro_batch,
        "each_bytes": list(found.peak_bytes),
        "first_blocks": list(found.first_blocks),
    }
