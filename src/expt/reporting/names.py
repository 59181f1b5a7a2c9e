"""Words for the names of metrics and states."""

from __future__ import annotations

SPLITS = {"val": "validation", "test": "test"}
STATES = {
    "completed": "completed",
    "over_budget": "over budget",
    "out_of_memory": "out of memory",
    "predicted_over": "predicted over",
    "pruned": "pruned",
    "failed": "failed",
    "stopped": "stopped",
    "unfinished": "unfinished",
}


def metric_words(metric: str) -> str:
    """Return ``validation MAE`` for ``val/mae``."""
    split, _, name = metric.rpartition("/")
    words = name.upper() if len(name) <= 4 else name.replace("_", " ")
    return f"{SPLITS.get(split, split)} {words}".strip()
