"""How far predicted actions are from demonstrated ones, in the robot's own units.

Letters: `B` samples, `K` candidates, `H` steps of a chunk, `A` values of an action.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from expt.errors import ModelError
from expt.job import Batch, Metric


def action_metrics(names: Sequence[str], samples: int) -> list[Metric]:
    """Return what is reported of actions with these names: L1 (monitored), MSE, L1 of each."""
    best = [Metric("best_l1", label=f"L1, best of {samples}")] if samples > 1 else []
    joints = [
        Metric(f"l1_{key}", label=f"L1 {name}")
        for key, name in zip(keys_of(names), names, strict=True)
    ]
    return [
        Metric("l1", label="L1", digits=4),
        Metric("mse", label="MSE", digits=4),
        *best,
        *joints,
    ]


def keys_of(names: Sequence[str]) -> list[str]:
    """Return names that can be keys of figures: letters, digits and underscores, all different."""
    plain = (re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower() for name in names)
    return distinct([name or str(number) for number, name in enumerate(plain)])


def distinct(names: Sequence[str]) -> list[str]:
    """Return names that are all different: one that was there before gets a number."""
    found: list[str] = []
    for number, name in enumerate(names):
        key, next_number = name, number
        while key in found:
            key, next_number = f"{name}_{next_number}", next_number + 1
        found.append(key)
    return found


def chosen(prediction: Tensor, batch: Batch) -> Tensor:
    """Return the action that a model decided for, [B, H, A]: the first of K where there are K.

    Raises:
        ModelError: the model returned something of another shape.

    """
    one = prediction[:, 0] if prediction.dim() == 4 else prediction
    if one.shape != batch.target.shape:
        raise ModelError(
            f"the model returned {list(prediction.shape)}; expected {list(batch.target.shape)} "
            "[samples, steps of a chunk, values of an action], or several such along a second axis"
        )
    return one


class ActionErrors:
    """Sums over the known entries of a split; see `expt.job.Accumulator`.

    Args:
        std: of each value in the training part [A], which takes an error back to its unit.
        names: of the values.
        samples: K; the best of them is reported where there are several.

    """

    def __init__(self, std: Tensor, names: Sequence[str], samples: int) -> None:
        self._std, self._keys, self._samples = std, keys_of(names), samples
        self._absolute = torch.zeros(len(names), dtype=torch.float64)
        self._squared = torch.zeros(len(names), dtype=torch.float64)
        self._known = torch.zeros(len(names), dtype=torch.float64)
        self._best = torch.zeros((), dtype=torch.float64)

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add a batch; what lies beyond the end of an episode is NaN and does not count."""
        if self._std.device != prediction.device:
            for name in ("_std", "_absolute", "_squared", "_known", "_best"):
                setattr(self, name, getattr(self, name).to(prediction.device))
        chosen(prediction, batch)
        candidates = prediction if prediction.dim() == 4 else prediction.unsqueeze(1)
        target = batch.target.unsqueeze(1)
        known = target.isfinite()
        error = torch.where(known, (candidates.float() - target) * self._std, 0.0).abs().double()
        self._absolute += error[:, 0].sum(dim=(0, 1))
        self._squared += error[:, 0].square().sum(dim=(0, 1))
        self._known += known[:, 0].sum(dim=(0, 1))
        self._best += error.sum(dim=(2, 3)).min(dim=1).values.sum()

    def compute(self) -> dict[str, float]:
        """Return the figures; NaN where nothing was known."""
        known = self._known.sum()
        found = {
            "l1": float(self._absolute.sum() / known),
            "mse": float(self._squared.sum() / known),
        }
        if self._samples > 1:
            found["best_l1"] = float(self._best / known)
        each = (self._absolute / self._known).tolist()
        return found | {f"l1_{key}": value for key, value in zip(self._keys, each, strict=True)}
