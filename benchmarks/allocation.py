"""What `task=allocate` and `task=cards` recommend: checked by plans of their own, and by runs.

    python benchmarks/allocation.py [--again] [--only SECTION]

Sections: `cards`, models on cards of 8 to 80 GiB: what is recommended is planned again in a process
of its own with the card as its budget, and compared with the guides' settings for that card by
counted arithmetic; `enforced`, trainings on the CPU under an enforced budget with what is
recommended, and with the next larger micro-batch. Rows already in the result file are kept unless
`--again`. Needs the extras `sim` and `vla`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, markdown, run_expt, run_sections
from vla_plans import SEEN, pictures

NAME = "allocation"
GIB = 2**30
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)
CONTEXT_GIB = 0.6
OWN_FOLDER = ROOT / "benchmarks" / "own_conf"
ONCE = "memory.activation_checkpointing=false"
AGAIN = "memory.activation_checkpointing=true"


@dataclass(frozen=True)
class Job:
    """A training, and what the guides set for it by card."""

    lines: tuple[str, ...]
    guides: Mapping[int, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


def jobs() -> dict[str, Job]:
    """Return the models."""
    video = (
        "experiment=video", "+memory=full", "model=r3d", "data.frames=16", "data.pixels=224",
        "data.eval_batch_size=4", "+data.scale={data.pixels:[224,168,112],data.frames:[16,8]}",
        "memory.gradient_accumulation=1", "memory.precision=fp16",
    )  # fmt: skip
    vla = (
        *SEEN, pictures(), "+memory=lite", "model=vla_qwen", "data.batch_size=32",
        "data.eval_batch_size=4", "memory.precision=bf16", "memory.gradient_accumulation=1", ONCE,
    )  # fmt: skip

    def parts(count: int, *more: str) -> tuple[str, ...]:
        return (f"memory.gradient_accumulation={count}", *more)

    frames = ("experiment=deepfake", "+memory=full", "model=frame_sequence", "data.pixels=224")
    return {
        "traffic, full": Job(("+memory=full", "memory.precision=auto"), {32: (parts(2),)}),
        "video, batch 4": Job((*video, "data.batch_size=4"), {24: (parts(2),), 12: (parts(4),)}),
        "video, batch 8": Job(
            (*video, "data.batch_size=8"), {8: (parts(8, "data.pixels=112"),)}
        ),
        "frames, batch 12": Job(
            (
                *frames, "data.batch_size=12", "data.eval_batch_size=12",
                "+data.scale={data.pixels:[224,168,112],data.frames:[24,16,8]}",
            ),
            {12: (parts(1),)},
        ),
        "VLA 3B, batch 32": Job(
            vla, {24: (parts(16, AGAIN), parts(8, AGAIN)), 40: (parts(8),), 80: (parts(4),)}
        ),
        "LLaVA-7B, all weights": Job(
            ("experiment=llava", "+memory=lite", "data.eval_batch_size=1", ONCE)
        ),
        "own language model": Job(
            (f"hydra.searchpath=[file://{OWN_FOLDER}]", "data=tokens", "model=decoder", ONCE)
        ),
    }  # fmt: skip


def cards() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return a row for each model."""
    return {name: partial(recommended, job) for name, job in jobs().items()}


def recommended(job: Job) -> dict[str, Any]:
    """Return what is recommended for every card, and how the guides' settings compare."""
    from hydra import initialize_config_dir

    from expt.commands.allocate.allocator import Allocator
    from expt.commands.allocate.variants import Variants
    from expt.commands.cards import card_row
    from expt.config.compose import conf_dir, register

    register()
    started = time.perf_counter()
    with initialize_config_dir(str(conf_dir())):
        variants = Variants(("tracking=none", *job.lines), "cuda")
        allocator = Allocator(variants, variants().settings)
        rows = []
        for size in CARDS:
            row = card_row(allocator, size, CONTEXT_GIB)
            way = tuple(line for line in row["changes"] if "gradient_accumulation" not in line)
            operations = variants(way).operations
            row["gflops_per_sample"] = None if operations is None else operations / 1e9
            row["guides"] = [
                compared(variants, lines, row["limit_bytes"]) for lines in job.guides.get(size, ())
            ]
            rows.append(row)
    seconds = time.perf_counter() - started
    checked: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:  # from the smallest card on, on which it is hardest to fit
        changes = tuple(row["changes"])
        if changes not in checked:
            checked[changes] = planned_apart(job.lines, changes, row["usable_bytes"])
        row["apart"] = checked[changes]
    return {"cards": rows, "seconds": seconds}


def compared(variants: Any, lines: tuple[str, ...], limit_bytes: int) -> dict[str, Any]:
    """Return a guide's settings: whether they fit, and their counted arithmetic."""
    variant = variants(lines)
    planned = variant.plan()
    operations = variant.operations
    return {
        "changes": list(lines),
        "micro_batch": variant.micro_batch,
        "peak_bytes": planned.peak_bytes,
        "fits": planned.within(limit_bytes).demand_bytes <= limit_bytes,
        "gflops_per_sample": None if operations is None else operations / 1e9,
    }


def planned_apart(lines: Sequence[str], changes: Sequence[str], budget: int) -> dict[str, Any]:
    """Return the peak of a command line of its own, and whether it fits the card."""
    given = {line.partition("=")[0]: line for line in (*lines, *changes)}
    with tempfile.TemporaryDirectory() as folder:
        run_expt(
            "task=plan", *given.values(), "memory.target=cuda", f"memory.budget={budget}",
            f"hydra.run.dir={folder}", PYTHONPATH=_path(),
        )  # fmt: skip
        found = json.loads((Path(folder) / "plan.json").read_text())
    return {"peak_bytes": found["peak_bytes"], "fits": found["fits"]}


def _path() -> str:
    return os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])


SHORT = (
    "trainer.epochs=1", "trainer.steps_per_epoch=3", "trainer.eval_batches=1",
    "trainer.device=cpu", "loader.num_workers=0", "fit.margin=1.0",
)  # fmt: skip
ENFORCED: Mapping[str, tuple[tuple[str, ...], float]] = {
    "traffic, lite": (("+memory=lite", "data.eval_batch_size=2"), 0.5),
    "video, small": (
        (
            "experiment=video", "+memory=lite", "memory.gradient_accumulation=1",
            "memory.forward_chunks=1", "data.eval_batch_size=1",
        ),
        0.5,
    ),
    "frames, small": (
        (
            "experiment=deepfake", "+memory=lite", "memory.gradient_accumulation=1",
            "memory.forward_chunks=1", "data.eval_batch_size=1",
        ),
        0.5,
    ),
}  # fmt: skip
"""Configurations, and the budget as a part of what each is predicted to take. All of it may be
taken (`fit.margin=1`), so that what is one step larger is over it by the plan alone."""


def enforced() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return a row for each configuration that is run under a budget."""
    return {name: partial(run_inside, *given) for name, given in ENFORCED.items()}


def run_inside(lines: tuple[str, ...], part: float) -> dict[str, Any]:
    """Return what the recommended step takes under an enforced budget, and the next larger one."""
    with tempfile.TemporaryDirectory() as folder:
        run_expt("task=plan", *lines, *SHORT, "memory.target=cpu", f"hydra.run.dir={folder}/plan")
        whole = json.loads(Path(f"{folder}/plan/plan.json").read_text())["peak_bytes"]
        budget = int(part * whole)
        run_expt(
            "task=allocate", *lines, *SHORT, "memory.target=cpu", f"memory.budget={budget}",
            f"hydra.run.dir={folder}/allocate",
        )  # fmt: skip
        record = json.loads(Path(f"{folder}/allocate/allocation.json").read_text())
        chosen = record["chosen"]
        given = {line.partition("=")[0]: line for line in (*lines, *chosen["changes"])}
        inside = trained(tuple(given.values()), budget, f"{folder}/inside")
        parts = chosen["gradient_accumulation"]
        given["memory.gradient_accumulation"] = f"memory.gradient_accumulation={parts // 2}"
        larger = trained(tuple(given.values()), budget, f"{folder}/larger") if parts > 1 else None
    return {
        "configured_bytes": whole,
        "budget_bytes": budget,
        "changes": chosen["changes"],
        "predicted_bytes": chosen["peak_bytes"],
        "inside": inside,
        "larger": larger,
    }


def trained(lines: tuple[str, ...], budget: int, folder: str) -> dict[str, Any]:
    """Return how a training ended under an enforced budget without recovery, and its peak alone.

    The peak is of another run without a budget: the ledger that enforces one does not see what
    kernels hold inside.
    """
    limits = (f"memory.budget={budget}", "memory.on_overflow=train", "memory.recover=false")
    under, free = (
        _result((*lines, *SHORT, *more), f"{folder}-{name}")
        for name, more in (("enforced", limits), ("free", ()))
    )
    return {
        "status": under["status"],
        "reason": under["stop_reason"],
        "measured_bytes": free["memory"]["peak_allocated_bytes"],
    }


def _result(lines: tuple[str, ...], folder: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable, "-m", "expt", "tracking=none", "trainer.progress=false", *lines,
            f"hydra.run.dir={folder}",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    written = Path(folder) / "result.json"
    if not written.exists():
        raise RuntimeError(f"the run was not begun: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def cards_table(rows: Mapping[str, Any]) -> str:
    """Return what is recommended, card by card, and the verdicts."""
    columns = (
        "model", "card", "micro-batch", "precision", "checkpointed", "changed", "peak", "used",
        "a plan of its own", "GFLOP a sample", "guides' setting there",
    )  # fmt: skip
    body, inside, total, better, compared_with = [], 0, 0, 0, 0
    for name, found in rows.items():
        for row in found["cards"]:
            if row["fits"]:
                total += 1
                inside += row["apart"]["fits"] is True
            for guide in row["guides"]:
                compared_with += 1
                better += not guide["fits"] or _at_least(row, guide)
            skipped = ("gradient_accumulation", "precision", "activation_checkpointing")
            changed = [line for line in row["changes"] if not any(s in line for s in skipped)]
            work = row["gflops_per_sample"]
            body.append(
                (
                    name,
                    f"{row['card_gib']} GiB",
                    f"{row['micro_batch']} x {row['gradient_accumulation']}",
                    row["precision"],
                    {True: "yes", False: "no"}.get(row["activation_checkpointing"], "partly"),
                    ", ".join(changed),
                    f"{row['peak_bytes'] / GIB:.2f} GiB",
                    f"{row['used']:.0%}",
                    {True: "fits", False: "does not fit", None: "not known"}[row["apart"]["fits"]],
                    "-" if work is None else f"{work:.4g}",
                    "; ".join(_guide(guide) for guide in row["guides"]),
                )
            )
    return (
        f"Predicted for CUDA. Of {total} recommendations said to fit, {inside} fit by a plan of "
        "their own, in another process with the card as its budget. Against the guides' settings "
        f"for a card, {better} of {compared_with} recommendations need no more arithmetic a "
        "sample, with a micro-batch at least as large, or the guide's setting does not fit. A "
        "guide's setting with smaller pictures needs less arithmetic: sizes are kept here as long "
        "as they fit.\n\n"
    ) + markdown(columns, body)


def _at_least(row: Mapping[str, Any], guide: Mapping[str, Any]) -> bool:
    """Tell whether a recommendation does at least as many samples a second, as counted."""
    mine, its = row["gflops_per_sample"], guide["gflops_per_sample"]
    if mine is None or its is None:
        return False
    same = abs(mine - its) <= 1e-6 * its
    return bool(row["micro_batch"] >= guide["micro_batch"] if same else mine < its)


def _guide(guide: Mapping[str, Any]) -> str:
    settings = " ".join(line.partition(".")[2] for line in guide["changes"])
    fits = f"{guide['peak_bytes'] / GIB:.2f} GiB" + ("" if guide["fits"] else ", does not fit")
    work = guide["gflops_per_sample"]
    return f"{settings}: {fits}" + ("" if work is None else f", {work:.4g} GFLOP")


def enforced_table(rows: Mapping[str, Any]) -> str:
    """Return how trainings under an enforced budget ended."""
    columns = (
        "training", "as configured", "budget", "recommended", "predicted", "measured",
        "with twice the micro-batch",
    )  # fmt: skip

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:.1f} MiB"

    body = [
        (
            name,
            mib(row["configured_bytes"]),
            mib(row["budget_bytes"]),
            " ".join(row["changes"]),
            mib(row["predicted_bytes"]),
            f"{mib(row['inside']['measured_bytes'])}, {row['inside']['status']}",
            "-"
            if row["larger"] is None
            else f"{mib(row['larger']['measured_bytes'])}, {row['larger']['status']}",
        )
        for name, row in rows.items()
    ]
    return (
        "On the CPU: what is recommended, and the next larger micro-batch; the peak of each, and "
        "how it ends under an enforced budget without recovery. What kernels hold inside is in the "
        "peaks, and nothing that a budget on the CPU can be enforced on.\n\n"
    ) + markdown(columns, body)


SECTIONS: dict[str, tuple[Callable[[], Any], Callable[[Mapping[str, Any]], str]]] = {
    "cards": (cards, cards_table),
    "enforced": (enforced, enforced_table),
}


if __name__ == "__main__":
    run_sections(NAME, SECTIONS, str(__doc__))
