"""Two processes against one: the same losses, bytes per rank, plans, and a killed rank.

    python benchmarks/ranks.py            # what is not measured yet
    python benchmarks/ranks.py --again    # all of it

Writes ``results/ranks.json`` and ``.md``. Real processes on the CPU, with gloo; each row is kept as
soon as it is there. The models are below: a training imports this file by its name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    ROOT,
    last_words,
    load,
    markdown,
    provenance,
    source_line,
    stamped,
    store,
)
from torch import Tensor, nn

from expt.files import write_json
from expt.units import format_bytes

NAME = "ranks"
STRATEGIES = ("one", "ddp", "fsdp")
CHANNELS, PIXELS = 4, 6
"""Of a clip of the toy data, which has as many frames as channels here."""
KILL_AT = "RANKS_KILL_AT"
"""Training passes after which rank 1 kills itself."""


class Killed(nn.Module):
    """A model that may end its process, for whoever measures what follows."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """Run the model, if the process is to live."""
        if self.training and os.environ.get("RANK") == "1" and type(x) is torch.Tensor:
            Killed.passes += 1
            if str(Killed.passes) == os.environ.get(KILL_AT):
                os.kill(os.getpid(), 9)
        return self.predict(x)


class Perceptron(Killed):
    """Residual blocks of two layers."""

    def __init__(self, num_inputs: int, num_classes: int, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(),
                          nn.Linear(4 * width, width))
            for _ in range(depth)
        )  # fmt: skip
        self.last = nn.Linear(width, num_classes)

    def predict(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Encoder(Killed):
    """A transformer over the frames."""

    def __init__(self, num_inputs: int, num_classes: int, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS * PIXELS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.last = nn.Linear(width, num_classes)

    def predict(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x.flatten(2))).mean(dim=1))


class Residual(nn.Module):
    """Two convolutions around a normalisation of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.norm(self.one(x)).relu())


class Convolutions(Killed):
    """Residual blocks of convolutions."""

    def __init__(self, num_inputs: int, num_classes: int, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.last = nn.Linear(width, num_classes)

    def predict(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(dim=(2, 3)))


SGD = ("optimizer=sgd", "optimizer.fused=false")
"""Compared are weights that were not divided by the size of a gradient, which may be rounding."""
MODELS = ("Perceptron", "Encoder", "Convolutions")


def line(model: str, run: Path, strategy: str, *more: str) -> list[str]:
    """Return the command line of a training."""
    two = [] if strategy == "one" else ["trainer.devices=2", f"trainer.strategy={strategy}"]
    return [
        sys.executable, "-m", "expt", f"--config-dir={ROOT / 'tests/toys/conf'}", "data=clips",
        "model=classifier", f"model._target_=ranks.{model}", "model.width=128", "~model.dropout",
        "~model.batch_norm", "tracking=none", "trainer.progress=false", "trainer.device=cpu",
        "trainer.schedule=constant", "trainer.epochs=2", "trainer.checkpoint_every_steps=2",
        "data.batch_size=14", "data.eval_batch_size=4", "loader.num_workers=1",
        f"hydra.run.dir={run}", *two, *more,
    ]  # fmt: skip


def trained(command: list[str], folder: Path, **environment: str) -> tuple[int, float, str]:
    """Run a command line; return exit code, seconds, and what it said last."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "tests/toys", "benchmarks"))
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return done.returncode, time.monotonic() - started, last_words(done.stderr)


def result_of(run: Path) -> dict[str, Any]:
    """Return a run's result, with the loss of its last epoch and its weights."""
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    history = json.loads((run / "history.json").read_text(encoding="utf-8"))
    return {**found, "loss": [row["loss"] for row in history]}


def weights(run: Path) -> Mapping[str, Tensor]:
    """Return a run's last weights."""
    stored = torch.load(run / "checkpoints/last.pt", "cpu", weights_only=True)
    kept: Mapping[str, Tensor] = stored["model"]
    return kept


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of weights, as a part of the largest weight of its tensor."""
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-9))
        for name in theirs
    )


def measured(model: str, strategy: str, folder: Path) -> dict[str, Any]:
    """Train once, and compare with one process and with the plan.

    Raises:
        RuntimeError: it failed.

    """
    run, one = folder / f"{model}-{strategy}", folder / f"{model}-one"
    for name, how in ((one, "one"), (run, strategy)):
        if not (name / "result.json").exists():
            code, _, words = trained(line(model, name, how, *SGD), folder)
            if code:
                raise RuntimeError(f"{model} {how}: exit code {code}: {words}")
    adam = folder / f"{model}-{strategy}-adam"
    code, _, words = trained(line(model, adam, strategy), folder)
    if code:
        raise RuntimeError(f"{model} {strategy}: exit code {code}: {words}")
    ours, theirs, planned = result_of(run), result_of(one), result_of(adam)
    losses = zip(ours["loss"], theirs["loss"], strict=True)
    ranks = planned["ranks"] or [
        {"peak_allocated_bytes": planned["memory"]["peak_allocated_bytes"]}
    ]
    return {
        "model": model,
        "strategy": strategy,
        "parameters": planned["parameters"],
        "loss": ours["loss"][-1],
        "loss_difference": max(abs(a / b - 1) for a, b in losses),
        "weights_difference": difference(weights(run), weights(one)),
        "same_metrics": all(
            abs(value - theirs["metrics"][name]) <= 1e-5 * abs(value)
            for name, value in ours["metrics"].items()
        ),
        "peak_bytes": [rank["peak_allocated_bytes"] for rank in ranks],
        "predicted_bytes": planned["memory"]["predicted_peak_bytes"],
        "prediction_error": planned["memory"]["prediction_error"],
    }


def killed(strategy: str, folder: Path) -> dict[str, Any]:
    """Kill one of two ranks, go on, and compare with a run that nobody disturbed.

    Raises:
        RuntimeError: one of the other trainings failed.

    """
    model, whole, run = MODELS[0], folder / f"whole-{strategy}", folder / f"killed-{strategy}"
    code, _, words = trained(line(model, whole, strategy), folder)
    died, seconds, said = trained(line(model, run, strategy), folder, **{KILL_AT: "6"})
    again, _, more = trained(line(model, run, strategy, "trainer.resume=true"), folder)
    if code or again:
        raise RuntimeError(f"exit codes {code} and {again}: {words} {more}")
    ours, theirs = result_of(run), result_of(whole)
    return {
        "strategy": strategy,
        "exit_code": died,
        "seconds": seconds,
        "said": said,
        "resumed_from_step": ours["resumed_from_step"],
        "same_weights": ours["weights_sha256"] == theirs["weights_sha256"],
        "same_metrics": ours["metrics"] == theirs["metrics"],
    }


def measure(again: bool) -> dict[str, Any]:
    """Measure what is not there yet; every row is stored when it is done."""
    found: dict[str, Any] = {} if again else load(NAME)
    found.setdefault("made", provenance())
    rows, kills = found.setdefault("rows", []), found.setdefault("kills", [])
    known = {(row["model"], row["strategy"]) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, str(ROOT / "tests/toys"))
        from clips import write_clips

        write_clips(folder / "clips")
        for model in MODELS:
            for strategy in STRATEGIES:
                if (model, strategy) not in known:
                    rows.append(stamped(measured(model, strategy, folder)))
                    write_json(RESULTS / f"{NAME}.json", found)
                    print(rows[-1], flush=True)
        for strategy in STRATEGIES[1:]:
            if strategy not in {row["strategy"] for row in kills}:
                kills.append(stamped(killed(strategy, folder)))
                write_json(RESULTS / f"{NAME}.json", found)
                print(kills[-1], flush=True)
    return found


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    alone = {row["model"]: row for row in found["rows"] if row["strategy"] == "one"}
    columns = ("model", "ranks", "loss, other than one process", "weights", "peak of a rank",
               "of one process", "predicted", "error")  # fmt: skip
    rows = []
    for row in found["rows"]:
        peak, one = max(row["peak_bytes"]), max(alone[row["model"]]["peak_bytes"])
        rows.append([
            row["model"].lower(),
            "1" if row["strategy"] == "one" else f"2, {row['strategy']}",
            "-" if row["strategy"] == "one" else f"{row['loss_difference']:.0e}",
            "-" if row["strategy"] == "one" else f"{row['weights_difference']:.0e}",
            format_bytes(peak), f"{100 * peak / one:.0f} %",
            format_bytes(row["predicted_bytes"]), f"{100 * row['prediction_error']:+.2f} %",
        ])  # fmt: skip
    worst = max(abs(row["prediction_error"]) for row in found["rows"])
    text = markdown(columns, rows)
    text += f"\nThe worst prediction is {100 * worst:.2f} % off.\n"
    for row in found["kills"]:
        same = "the same weights as" if row["same_weights"] else "OTHER weights than"
        text += (
            f"\nRank 1 of 2 ({row['strategy']}) killed with SIGKILL: all ended after "
            f"{row['seconds']:.0f} s in all (`{row['said']}`); resumed from step "
            f"{row['resumed_from_step']}, it ended with {same} a run that nobody disturbed.\n"
        )
    return f"{text}\n{source_line(found, NAME)}"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure all of it anew")
    found = measure(parser.parse_args().again)
    store(NAME, found, tables(found))
    print(tables(found))


if __name__ == "__main__":
    main()
