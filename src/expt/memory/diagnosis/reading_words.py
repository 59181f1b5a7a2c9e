"""Words that say what an amount of memory in a log or a table is, and the reading they make up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from expt.memory.diagnosis.trend import Reading

LABELS = (  # the first that stands next to an amount says what it is
    ("ignored", r"checkpoint|saved?|file|data ?set|download|params?|parameters|weights|disk|batch"),
    ("total_bytes", r"total|capacity|limit|budget|max allowed"),
    ("free_bytes", r"free|available|avail"),
    ("peak_bytes", r"peak|max(?:imum)?(?:_\w+)?|high[- ]water"),
    ("reserved_bytes", r"\w*reserved\w*|cached?|pool"),
    ("other_bytes", r"others?(?: process\w*)?"),
    ("allocated_bytes", r"\w*alloc\w*|\w*mem\w*|used|usage|gpu|vram|rss|current|cuda(?::\d+)?"),
)
BEFORE = [(name, re.compile(rf"(?:^|[\W_])(?:{words})[\W_]*$", re.I)) for name, words in LABELS]
ANYWHERE = [(name, re.compile(rf"(?:^|[\W_])(?:{words})(?![a-z])", re.I)) for name, words in LABELS]
AFTER = [(name, re.compile(rf"^\s?(?:is |already )?(?:{words})\b", re.I)) for name, words in LABELS]


def label(patterns: Iterable[tuple[str, re.Pattern[str]]], text: str) -> str | None:
    """Return what the first pattern that is found in a text stands for."""
    return next((name for name, pattern in patterns if pattern.search(text)), None)


def as_reading(step: float, values: Mapping[str, int]) -> Reading:
    """Return a reading of amounts by what they are; allocated or peak bytes are among them."""
    allocated = values.get("allocated_bytes")
    peak = values.get("peak_bytes")
    reading = Reading(step, allocated if allocated is not None else values["peak_bytes"])
    return replace(
        reading,
        reserved_bytes=values.get("reserved_bytes"),
        other_bytes=values.get("other_bytes"),
        peak_bytes=peak if allocated is not None else None,
        total_bytes=values.get("total_bytes"),
        high_water=allocated is None,
    )
