"""How right: the predicted peak against the measured one, over our models and others.

    python benchmarks/prediction.py [--again] [--only TEXT]

Measured are `torch.profiler`'s allocation events of a real step on the CPU plus what lived
before it, not our own ledger. Each row is a process of its own; rows already in the result file
are kept unless `--again`. Models from `transformers` need that package.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import planned_steps
import torch
from common import load, markdown, provenance, source_line, stamped, store
from foreign_loops import LOOPS
from foreign_models import MODELS
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-4),
}

WARM_UP = 8
"""Steps before the one that is measured: some optimizers take another formula after five."""


def rows() -> dict[str, dict[str, Any]]:
    """Return the configurations by name."""
    found: dict[str, dict[str, Any]] = {}
    for preset, precision, checkpointing in itertools.product(
        ("minimal", "lite", "full"), ("fp32", "bf16"), ("false", "true")
    ):
        name = f"alternating {preset} {precision}" + (" ckpt" * (checkpointing == "true"))
        found[name] = ours(f"+memory={preset}", f"memory.precision={precision}",
                           f"memory.activation_checkpointing={checkpointing}")  # fmt: skip
    for preset, batch in itertools.product(("minimal", "lite"), (4, 32)):
        found[f"alternating {preset} batch {batch}"] = ours(
            f"+memory={preset}", f"data.batch_size={batch}"
        )
    for preset, optimizer in itertools.product(("minimal", "lite"), ("adam", "sgd")):
        found[f"alternating {preset} {optimizer}"] = ours(
            f"+memory={preset}", f"optimizer={optimizer}"
        )
    found["alternating lite accumulation 4"] = ours(
        "+memory=lite", "memory.gradient_accumulation=4"
    )
    for model in ("alternating", "stid"):
        found[f"{model} optimizer in backward"] = ours(
            "+memory=lite", f"model={model}", "memory.optimizer_in_backward=true",
            "trainer.gradient_clip_norm=null",
        )  # fmt: skip
    for preset, precision in (("minimal", "fp32"), ("minimal", "bf16"), ("lite", "fp32")):
        found[f"alternating {preset} {precision} 207 sensors"] = ours(
            f"+memory={preset}", f"memory.precision={precision}", "data=metr_la_week"
        )
    for precision, batch in itertools.product(("fp32", "bf16"), (16, 64)):
        found[f"phase1 {precision} batch {batch}"] = ours(
            "+memory=lite", "model=phase1", f"memory.precision={precision}",
            f"data.batch_size={batch}",
        )  # fmt: skip
        found[f"stid {precision} batch {batch}"] = ours(
            "+memory=lite", "model=stid", f"memory.precision={precision}",
            f"data.batch_size={batch}",
        )  # fmt: skip
    for model, (precision, batch, optimizer) in itertools.product(
        MODELS,
        (("fp32", 8, "adamw"), ("fp32", 32, "sgd"), ("bf16", 16, "adamw_foreach"),
         ("fp32", 16, "adafactor")),
    ):  # fmt: skip
        found[f"{model} {precision} batch {batch} {optimizer}"] = {
            "foreign": model, "precision": precision, "batch": batch, "optimizer": optimizer,
        }  # fmt: skip
    found |= {f"loop {name}": {"loop": name} for name in LOOPS}
    return found


def ours(*overrides: str) -> dict[str, Any]:
    return {"overrides": [*overrides, "trainer.device=cpu"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--row")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(**rows()[arguments.row])))
        return
    record = {"rows": {}, **load("prediction")}
    for name in rows():
        if arguments.only not in name or (name in record["rows"] and not arguments.again):
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--row", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{name}: not measured: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        row = record["rows"][name] = stamped(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {100 * error(row):+.2f} %, {row['seconds']:.2f} s", flush=True)
        record["made"] = provenance()
        store("prediction", record, *tables(record))


def measure(
    overrides: Iterable[str] = (),
    foreign: str = "",
    precision: str = "fp32",
    batch: int = 0,
    optimizer: str = "",
    loop: str = "",
) -> dict[str, Any]:
    """Return predicted and measured peak of one configuration."""
    if loop:
        made = planned_steps.loop(LOOPS[loop])
    elif foreign:
        made = planned_steps.foreign(
            MODELS[foreign], precision, batch, OPTIMIZERS[optimizer], "cpu"
        )
    else:
        made = planned_steps.ours(list(overrides), "cpu")
    for _ in range(WARM_UP):
        made.parts[0]()
    peaks = [profiled_peak(*pair) for pair in zip(made.parts, made.live, strict=True)]
    return as_row(made.predicted, max(peaks))


def as_row(predicted: Any, measured: int) -> dict[str, Any]:
    return {
        "predicted_bytes": predicted.peak_bytes,
        "interval_bytes": list(predicted.interval_bytes),
        "measured_bytes": measured,
        "phase": predicted.phase,
        "by_category": dict(predicted.by_category),
        "corrections": dict(predicted.corrections),
        "method": predicted.method,
        "seconds": predicted.seconds,
    }


def profiled_peak(step: Callable[[], object], live: Callable[[], list[Tensor]]) -> int:
    """Return the highest sum of allocations during `step`, plus what was alive before."""
    from torch.profiler import ProfilerActivity, profile

    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in live()}
    before = sum(storages.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return before + max(itertools.accumulate((change for _, change in changes), initial=0))


def peaks_table(rows: Mapping[str, Any]) -> str:
    """Return predicted and measured peaks by configuration."""
    body = [
        (
            name,
            f"{row['predicted_bytes'] / 2**20:.1f} MiB",
            f"{row['measured_bytes'] / 2**20:.1f} MiB",
            f"{100 * error(row):+.2f} %",
            row["phase"].replace("_", " "),
        )
        for name, row in rows.items()
    ]
    return markdown(("configuration", "predicted", "measured", "error", "phase"), body)


def error(row: dict[str, Any]) -> float:
    """Predicted over measured, less one."""
    return float(row["predicted_bytes"] / row["measured_bytes"] - 1)


def tables(record: dict[str, Any]) -> tuple[str, str]:
    """Return the page's summary and the table of all rows."""
    found = record["rows"]
    gaps = sorted(abs(error(row)) for row in found.values())
    inside = sum(row["measured_bytes"] <= row["interval_bytes"][1] for row in found.values())
    summary = (
        f"Predicted against measured peak on the CPU over {len(gaps)} configurations "
        f"({sum(' batch ' in n and n.split()[0] in MODELS for n in found)} of models not ours): "
        f"median error {100 * statistics.median(gaps):.2f} %, nine in ten within "
        f"{100 * gaps[int(0.9 * (len(gaps) - 1))]:.2f} %, worst {100 * gaps[-1]:.2f} %; "
        f"{inside} of {len(gaps)} below the plan's upper bound. "
    )
    columns = ("configuration", "predicted", "measured", "error", "upper bound", "planning")
    mib = 1024**2
    body = [
        (
            name,
            f"{row['predicted_bytes'] / mib:.1f} MiB",
            f"{row['measured_bytes'] / mib:.1f} MiB",
            f"{100 * error(row):+.2f} %",
            f"{row['interval_bytes'][1] / mib:.1f} MiB",
            f"{row['seconds']:.1f} s",
        )
        for name, row in found.items()
    ]
    return summary + source_line(record, "prediction"), markdown(columns, body)


if __name__ == "__main__":
    main()
