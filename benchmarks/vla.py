"""The vision-language-action job: what it needs, learns, keeps of a sample, and costs.

    python benchmarks/vla.py [--again] [--only SECTION]

Sections are `plans` (predicted against measured), `guide` (guide C at real size, predicted),
`cache` (features kept against live), `cost` (of checkpointing) and `learning` (success in the
simulator). Rows that are in the result file already are kept unless `--again`. Pictures are
rendered first, which needs the extra `sim`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import vla_cache
import vla_learning
import vla_plans
from common import run_sections

NAME = "vla"
Rows = Mapping[str, Callable[[], dict[str, Any]]]
SECTIONS: dict[str, tuple[Callable[[], Rows], Callable[[Mapping[str, Any]], str]]] = {
    "plans": (vla_plans.predictions, vla_plans.prediction_table),
    "guide": (vla_plans.guide, vla_plans.guide_table),
    "cache": (vla_cache.runs, vla_cache.table),
    "cost": (vla_cache.costs, vla_cache.cost_table),
    "learning": (vla_learning.runs, vla_learning.table),
}


if __name__ == "__main__":
    run_sections(NAME, SECTIONS, str(__doc__))
