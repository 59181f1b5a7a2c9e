"""What a model predicts for a whole split, as a file and as figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expt.files import replace_atomically
from expt.job import DataSet, Predicted, Split
from expt.training.batches import Batches

FOLDER = "predictions"
"""In a run's directory."""
FORMATS = ("npz",)
"""Of data that do not write predictions themselves."""


def formats(data: DataSet) -> tuple[str, ...]:
    """Return the formats in which a data set's predictions can be written, the default first."""
    return tuple(data.prediction_formats) if isinstance(data, Predicted) else FORMATS


def write_predictions(batches: Batches, split: Split, predictions: Tensor, path: Path) -> None:
    """Write the predictions [B, ...] of a split's first samples that could be read.

    A data set which does not write its own gets an npz with ``predictions`` and ``indices``.
    """
    skipped = {index for part, index in batches.skipped if part == split}
    # As many samples as were predicted, from the first on, without those that were skipped.
    indices = [n for n in range(len(predictions) + len(skipped)) if n not in skipped]
    found = torch.tensor(indices[: len(predictions)], dtype=torch.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(batches.data, Predicted):
        batches.data.write_predictions(split, predictions, found, path)
        return

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, predictions=predictions.numpy(), indices=found.numpy())

    replace_atomically(path, write)
