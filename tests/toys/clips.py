"""A streamed job in one class: clips in files, read by worker processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blobs import CLASSES, Classification

from expt.errors import DataError
from expt.job import Batch

FRAMES, PIXELS = 4, 6
SPLITS = {"train": 48, "val": 12, "test": 12}


def write_clips(folder: Path) -> None:
    """Write noise with a bright row whose place is the class: ``train_007_1.npy`` is of class 1."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for number in range(count):
            label = number % CLASSES
            clip = draw.normal(size=(FRAMES, PIXELS, PIXELS)).astype(np.float32)
            clip[:, 2 * label] += 1.0
            np.save(folder / f"{split}_{number:03d}_{label}.npy", clip)


class Clips(Classification):
    """Clips in a folder; training clips are mirrored by chance. `log` gets a line per read."""

    def __init__(
        self, path: str, batch_size: int, eval_batch_size: int, log: str | None = None
    ) -> None:
        self.batch_size, self.eval_batch_size, self.log = batch_size, eval_batch_size, log
        self.files = {split: sorted(Path(path).glob(f"{split}_*.npy")) for split in SPLITS}
        if not all(self.files.values()):
            raise DataError(f"data.path={path}: there are no clips")

    def size(self, split: str) -> int:
        return len(self.files[split])

    def item(self, split: str, index: int, generator: torch.Generator) -> Batch:
        file = self.files[split][index]
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()} {file.name}\n")
        clip = torch.from_numpy(np.load(file))
        if split == "train" and torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(-1)
        return Batch({"x": clip}, torch.tensor(int(file.stem.rpartition("_")[2])))

    def sample_name(self, split: str, index: int) -> str:
        return str(self.files[split][index])

    def model_arguments(self) -> Mapping[str, Any]:
        return {"num_inputs": FRAMES * PIXELS * PIXELS, "num_classes": CLASSES}

    def fingerprint(self) -> str:
        names = " ".join(file.name for files in self.files.values() for file in files)
        return hashlib.sha256(names.encode()).hexdigest()[:16]
