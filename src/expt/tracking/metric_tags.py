"""The metrics of a run as tags: as many as it takes, because a store cuts a tag that is too long.

The first tag is ``metrics``, the next ``metrics.1``; each is a list in JSON, of `Metric.brief`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from expt.job import Metric

NAME = "metrics"
TAG_LENGTH = 8000
"""Characters of a tag that every store of MLflow keeps."""


def tags_of_metrics(described: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the tags that describe metrics, which `Metric.as_dict` described."""
    parts: list[list[dict[str, Any]]] = [[]]
    for stored in described:
        one = Metric.from_dict(stored).brief()
        if parts[-1] and len(json.dumps([*parts[-1], one])) > TAG_LENGTH:
            parts.append([])
        parts[-1].append(one)
    return {_name(number): json.dumps(part) for number, part in enumerate(parts)}


def metrics_of_tags(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what `tags_of_metrics` wrote, empty where there is nothing or it was cut."""
    found: dict[str, dict[str, Any]] = {}
    number = 0
    while _name(number) in tags:
        try:
            part = json.loads(tags[_name(number)])
        except ValueError:
            break
        for one in part:
            found.setdefault(one["name"], one)
        number += 1
    return list(found.values())


def _name(number: int) -> str:
    return f"{NAME}.{number}" if number else NAME
