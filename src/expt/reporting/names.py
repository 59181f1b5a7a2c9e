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


def metric_header(metric: str) -> str:
    """Return ``val MAE`` for ``val/mae``, for the head of a column."""
    split, _, name = metric.rpartition("/")
    return f"{split} {name.upper() if len(name) <= 4 else name.replace('_', ' ')}".strip()


def metric_words(metric: str) -> str:
    """Return ``validation MAE`` for ``val/mae``."""
    split, _, name = metric.rpartition("/")
    return metric_header(f"{SPLITS.get(split, split)}/{name}")


def escaped(cell: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return cell.replace("|", "\\|")
