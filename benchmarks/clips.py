"""The jobs on clips: what they learn, what they need, what they survive, and what they wait for.

    python benchmarks/clips.py [--again] [--only SECTION] [--gestures FILE]

Sections are `plans`, `guides`, `learning`, `faults`, `loader` and `gestures`; rows that are in the
result file already are kept unless `--again`, so that it goes on where it was stopped. `gestures`
needs the recording of UAV-GESTURE (joints as npz), which is not part of the project.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import clip_faults
import clip_gestures
import clip_learning
import clip_plans
from common import load, measure_sections, source_line

NAME = "clips"
Rows = Mapping[str, Callable[[], dict[str, Any]]]
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "plans": clip_plans.prediction_table,
    "guides": clip_plans.guide_tables,
    "learning": clip_learning.table,
    "faults": clip_faults.table,
    "loader": clip_learning.loader_table,
    "gestures": clip_gestures.table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="a section")
    parser.add_argument("--gestures", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {**{name: {} for name in TABLES}, **load(NAME)}
    measure_sections(
        NAME, record, sections(arguments.gestures), summary, arguments.again, arguments.only
    )


def sections(gestures: Path | None) -> dict[str, Callable[[], Rows]]:
    """Return what is measured, by section and row."""
    found = {
        "plans": clip_plans.predictions,
        "guides": clip_plans.guides,
        "learning": clip_learning.runs,
        "loader": clip_learning.loaders,
        "faults": clip_faults.faults,
    }
    return {**found, **({"gestures": partial(clip_gestures.runs, gestures)} if gestures else {})}


def summary(record: Mapping[str, Any]) -> str:
    """Return the page's tables."""
    parts = [table(record[name]) for name, table in TABLES.items() if record[name]]
    return "\n".join([*parts, source_line(record, NAME)])


if __name__ == "__main__":
    main()
