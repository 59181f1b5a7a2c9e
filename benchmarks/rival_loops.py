"""The loops that ours is compared with: a bare PyTorch loop, and lightning's Trainer.

The bare loop is what a paper's code does: a map-style data set over the series, the default
collation, a `DataLoader` in the main process. Lightning gets the same loader, and runs without
logger, checkpoints, progress bar or summary.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from expt.run.build import build
from expt.training import schedules

WARM_STEPS = 5
"""Steps before the clock starts; the ledger watches the first three of a run."""
PACKAGES = ("pytorch-lightning", "torchmetrics", "tqdm")
LIGHTNING = ROOT / "outputs" / "benchmarks" / "lightning"
"""Where `installed_lightning` puts it."""


class Windows(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """The training windows of a `TrafficData`, one at a time."""

    def __init__(self, data: Any) -> None:
        series, self.input_steps = data.series, data.input_steps
        self.length = data.input_steps + data.horizon
        self.starts = data.split_starts["train"]
        self.speed = torch.from_numpy(series.values)
        self.observed = self.speed > 0
        self.scaled = torch.where(self.observed, (self.speed - data.mean) / data.std, 0.0)
        midnight = series.timestamps.astype("datetime64[D]")
        seconds = (series.timestamps - midnight).astype("timedelta64[s]").astype("int64")
        self.time_of_day = torch.from_numpy(seconds // series.step_seconds)
        self.day_of_week = torch.from_numpy((midnight.astype("int64") + 3) % 7)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        start = int(self.starts[index])
        past = slice(start, start + self.input_steps)
        inputs = {
            "speed": self.scaled[past],
            "observed": self.observed[past],
            "time_of_day": self.time_of_day[past],
            "day_of_week": self.day_of_week[past],
        }
        return inputs, self.speed[start + self.input_steps : start + self.length]


class Rivals:
    """What a loop of one's own is written with: the model, the loader, the loss, the rates."""

    def __init__(self, settings: Any, device: str) -> None:
        self.settings, self.device = settings, torch.device(device)
        torch.manual_seed(settings.trainer.seed)
        self.data = build(settings, "data")
        model: nn.Module = build(settings, "model", **self.data.model_arguments())
        self.model = model.to(self.device)
        self.loader = DataLoader(
            Windows(self.data),
            batch_size=self.data.batch_size,
            shuffle=True,
            pin_memory=self.device.type == "cuda",
        )
        trainer = settings.trainer
        self.rate = schedules.factor(
            trainer.schedule.value, trainer.warmup_fraction, trainer.step_milestones, 0.1
        )

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """Return a new optimizer, and the rates of a whole run."""
        made = build(self.settings, "optimizer", params=list(self.model.parameters()))
        steps = self.settings.trainer.epochs * len(self.loader)
        return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: self.rate(step / steps))

    def loss(self, inputs: dict[str, Tensor], target: Tensor) -> Tensor:
        """Return the masked error in mph, as ours."""
        error = (self.model(**inputs).float() * self.data.std + self.data.mean - target).abs()
        valid = target > 0
        return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


def bare_seconds(rivals: Rivals, steps: int) -> float:
    """Run a plain loop over the loader."""
    optimizer, schedule = rivals.optimizer()
    rivals.model.train()
    clip = rivals.settings.trainer.gradient_clip_norm
    running = torch.zeros((), device=rivals.device)
    half = torch.autocast(rivals.device.type, torch.bfloat16, enabled=mixed(rivals.device))
    start = 0.0
    for number, (inputs, target) in enumerate(islice(forever(rivals.loader), WARM_STEPS + steps)):
        if number == WARM_STEPS:
            start = now(rivals.device)
        inputs = {key: value.to(rivals.device, non_blocking=True) for key, value in inputs.items()}
        with half:
            loss = rivals.loss(inputs, target.to(rivals.device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(rivals.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.detach()
    return now(rivals.device) - start


def lightning_seconds(rivals: Rivals, steps: int) -> float:
    """Run lightning's Trainer, without anything that can be turned off."""
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = rivals.model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return rivals.loss(*batch)

        def configure_optimizers(self) -> Any:
            optimizer, schedule = rivals.optimizer()
            step = {"scheduler": schedule, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": step}

    class Stopwatch(lightning.Callback):
        def __init__(self) -> None:
            self.done: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            if len(self.done) in (WARM_STEPS - 1, WARM_STEPS + steps - 1):
                self.done.append(now(rivals.device))
            else:
                self.done.append(0.0)

    stopwatch = Stopwatch()
    with quiet():
        lightning.Trainer(
            accelerator=rivals.device.type,
            devices=1,
            precision="bf16-mixed" if mixed(rivals.device) else "32-true",
            max_steps=WARM_STEPS + steps,
            gradient_clip_val=rivals.settings.trainer.gradient_clip_norm,
            callbacks=[stopwatch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(), rivals.loader)
    return stopwatch.done[-1] - stopwatch.done[WARM_STEPS - 1]


def mixed(device: torch.device) -> bool:
    """Tell whether `memory.precision=auto` means bf16 here."""
    return device.type == "cuda"


def now(device: torch.device) -> float:
    """Return the time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lightning's advice on loaders and devices off the screen."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def found_lightning() -> Path | None:
    """Return a folder that holds lightning, or None; nothing is installed."""
    if (LIGHTNING / "pytorch_lightning").is_dir():
        return LIGHTNING
    found = importlib.util.find_spec("pytorch_lightning")
    return Path(found.origin).parents[1] if found is not None and found.origin else None


def installed_lightning() -> Path | None:
    """Return a folder that holds lightning, or None; it is installed if it is not yet.

    What is locked stays locked.
    """
    folder = found_lightning()
    if folder is None:
        folder = LIGHTNING
        # Without dependencies: all others are here, and torch must not be fetched again.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
        lock = ["--constraint", str(ROOT / "requirements.lock"), "--target", str(folder)]
        done = subprocess.run([*command, *lock], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"lightning was not installed: {done.stderr.strip()[-300:]}", file=sys.stderr)
            return None
    return folder
