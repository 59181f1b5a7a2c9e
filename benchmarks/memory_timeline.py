"""Where the memory of a training step is: the tables and the picture of `debug=profile`.

    python benchmarks/memory_timeline.py [--again]

Three steps of the preset minimal with gradient accumulation over two micro-batches, on the CPU;
what a run with `debug=profile` leaves is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, kept, provenance, run_expt, source_line, store

from expt.memory.measuring.timeline_sums import OperatorMemory, PhaseMemory
from expt.training.profile_files import MEMORY, PICTURE, operator_table, phase_table
from expt.units import format_bytes

NAME = "memory_timeline"
SETTINGS = (
    "+memory=minimal", "debug=profile", "data=metr_la_29", "memory.gradient_accumulation=2",
    "trainer.device=cpu",
)  # fmt: skip
SHOWN_OPERATORS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true")
    if kept(NAME, parser.parse_args().again):
        return
    with tempfile.TemporaryDirectory() as folder:
        run_expt(*SETTINGS, f"hydra.run.dir={folder}")
        memory = json.loads((Path(folder) / MEMORY).read_text(encoding="utf-8"))
        shutil.copy(Path(folder) / PICTURE, RESULTS / f"{NAME}.png")
    record = {"made": provenance(), "settings": SETTINGS, "memory": memory}
    store(NAME, record, tables(record))


def tables(record: dict[str, Any]) -> str:
    """Return the peaks, and what there was by phase and operator."""
    memory = record["memory"]
    predicted, measured = memory["predicted_peak_bytes"], memory["measured_peak_bytes"]
    return "\n".join(
        [
            f"`{' '.join(record['settings'])}`: at most {format_bytes(memory['peak_bytes'])}, in "
            f"{memory['peak_phase']}; the run's meter measured {format_bytes(measured)} over its "
            f"first steps, {format_bytes(predicted)} were predicted.\n",
            phase_table([PhaseMemory(**row) for row in memory["phases"]]),
            operator_table([OperatorMemory(**r) for r in memory["operators"][:SHOWN_OPERATORS]]),
            source_line(record, NAME),
        ]
    )


if __name__ == "__main__":
    main()
