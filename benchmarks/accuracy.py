"""How accurate: persistence, stid and alternating on metr_la_29, chosen by validation.

    python benchmarks/accuracy.py [--models stid minimal lite] [--seeds 0] [--device cpu]

Every (model, seed) is a run of its own under outputs/accuracy, resumed where it was left and
skipped when completed; the result files are written again after each. Protocol: 12 steps in, 12
out, windows then a chronological 70/10/20 split, masked MAE in mph over the whole test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    ROOT,
    load,
    markdown,
    provenance,
    settings_for,
    source_line,
    stamped,
    store,
)

from expt.files import replace_atomically
from expt.jobs.traffic.metrics import MaskedErrors
from expt.run.build import build

MODELS = {
    "stid": ("experiment=stid",),
    "minimal": ("+memory=minimal", "experiment=accuracy"),
    "lite": ("+memory=lite", "experiment=accuracy"),
    "full": ("+memory=full", "experiment=accuracy"),
}
PUBLISHED = {"stid": "3.335 (published code, batch 64)", "minimal": "-", "lite": "-", "full": "-"}
METRICS = ("val/mae", "test/mae", "test/mae_15min", "test/mae_30min", "test/mae_60min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["stid", "minimal", "lite"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for model in arguments.models:
            name = f"{model}-seed{seed}-{arguments.device}"
            run = train(model, seed, arguments.device)
            # Read again: another process may have added a run meanwhile.
            record = {"persistence": persistence(), "runs": {}, **load("accuracy")}
            record["runs"][name] = stamped(
                {"model": model, "seed": seed, "device": arguments.device, **run}
            )
            record["made"] = provenance()
            store("accuracy", record, tables(record))
            plot(record)


def persistence() -> dict[str, float]:
    """Return the test errors of repeating the last reading as it is stored (missing is 0)."""
    data = build(settings_for("data=metr_la_29"), "data")
    errors = MaskedErrors(lambda mph: mph, 12, data.series.step_seconds)
    for indices in torch.arange(data.size("test")).split(256):
        batch = data.gather("test", indices)
        last = torch.where(batch.inputs["observed"], data.to_speed(batch.inputs["speed"]), 0.0)
        errors.update(last[:, -1:].expand_as(batch.target), batch)
    return {f"test/{name}": value for name, value in errors.compute().items()}


def train(model: str, seed: int, device: str) -> dict[str, Any]:
    """Train one model to its early stop, from where it was left, and return what it reached."""
    run_dir = ROOT / "outputs" / "accuracy" / f"{model}-seed{seed}-{device}"
    command = [
        sys.executable, "-m", "expt", *MODELS[model], f"trainer.seed={seed}",
        f"trainer.device={device}", "trainer.resume=true", "trainer.checkpoint_every_steps=500",
        f"hydra.run.dir='{run_dir}'", "tracking=none",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    history = json.loads((run_dir / "history.json").read_text(encoding="utf-8"))
    keys = ("parameters", "epochs", "steps", "seconds", "stop_reason", "weights_sha256", "device")
    return {
        "overrides": command[3:-2],
        **{key: result[key] for key in keys if key != "device"},
        "metrics": {name: result["metrics"][name] for name in METRICS},
        "peak_allocated_bytes": result["memory"]["peak_allocated_bytes"],
        "history": [
            {key: row[key] for key in ("epoch", "seconds", "loss", "val")} for row in history
        ],
    }


def tables(record: dict[str, Any]) -> str:
    """Return the page's table."""
    columns = ("model", "parameters", "15 / 30 / 60 min", "test MAE", "val MAE", "epochs", "time")
    fixed = record["persistence"]
    rows = [("persistence", "0", horizons(fixed), f"{fixed['test/mae']:.3f}", "-", "-", "-")]
    for model in MODELS:
        runs = [run for run in record["runs"].values() if run["model"] == model]
        if not runs:
            continue
        first = runs[0]
        label = model if model == "stid" else f"alternating, {model}"
        rows.append(
            (
                label + seeds(runs),
                f"{first['parameters'] / 1e3:.0f} K",
                horizons({key: mean(runs, key) for key in METRICS}),
                f"{mean(runs, 'test/mae'):.3f}{spread(runs)}",
                f"{mean(runs, 'val/mae'):.3f}",
                "/".join(str(run["epochs"]) for run in runs),
                f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f} min",
            )
        )
    note = (
        "Test MAE in mph on `metr_la_29` (29 of the 207 sensors, harder than the average), "
        "whole-set masked, best epoch by validation, tested once. "
    )
    return markdown(columns, rows) + "\n" + note + source_line(record, "accuracy")


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(run["metrics"][name] for run in runs)


def seeds(runs: list[dict[str, Any]]) -> str:
    return f" ({len(runs)} seeds)" if len(runs) > 1 else ""


def spread(runs: list[dict[str, Any]]) -> str:
    values = [run["metrics"]["test/mae"] for run in runs]
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def horizons(metrics: dict[str, float]) -> str:
    return " / ".join(f"{metrics[f'test/mae_{minutes}min']:.2f}" for minutes in (15, 30, 60))


def plot(record: dict[str, Any]) -> None:
    """Draw validation MAE against wall time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(MODELS):
        runs = [run for run in record["runs"].values() if run["model"] == model]
        for run in runs:
            minutes = [row["seconds"] / 60 for row in run["history"]]
            values = [row["val"] for row in run["history"]]
            best = min(range(len(values)), key=values.__getitem__)
            name = (model if model == "stid" else f"alternating, {model}") + seeds(runs)
            label = name if run is runs[0] else None
            axes.plot(minutes, values, color=f"C{number}", linewidth=1.2, label=label)
            axes.plot(minutes[best], values[best], "o", color=f"C{number}")
    axes.set(
        xlabel="wall time of training and validation (min)",
        ylabel="validation MAE (mph)",
        ylim=(None, 3.6),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path: Path = RESULTS / "accuracy.png"
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


if __name__ == "__main__":
    main()
