"""Plan published runs, one after the other: reads rows as JSON, writes a line of JSON for each.

Run by `published_gpu.py` in an environment of its own, never by hand.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import published_models
import torch

from expt.memory import plan
from expt.units import MIB

CONTEXT_BYTES = 128 * MIB
"""Of a card's memory, what the CUDA context takes."""
LEARNING_RATE = 1e-3
BEFORE_BACKWARD = 1
"""Rows' `zero_grad_mode` where gradients live through the next forward pass."""


def planned(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is predicted for a run, and the seconds that this took."""
    name, limit = row["model"], row["total_gpu_memory"] - CONTEXT_BYTES
    optimizer = published_models.OPTIMIZERS[row["optimizer"]]
    gradients_kept = row.get("zero_grad_mode") == BEFORE_BACKWARD
    found = plan(
        published_models.model_of(name),
        published_models.batch_of(name, row["batch"]),
        lambda weights: optimizer(weights, lr=LEARNING_RATE),
        None if gradients_kept else published_models.loss_of,
        step_fn=published_models.GradientsKept() if gradients_kept else None,
        target="cuda",
        limit_bytes=limit,
    )
    return {
        "predicted_reserved_bytes": found.demand_bytes,
        "interval_bytes": found.reserved_interval_bytes or found.interval_bytes,
        "runs_out": found.demand_bytes > limit,
        "least_fitting_bytes": int(found.demand_bytes * (1 + found.margin)),
        "peak_bytes": found.peak_bytes,
        "method": found.method,
        "seconds": found.seconds,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    published_models.torchvision_models()  # before anything else imports torchvision
    import transformers.modeling_utils  # noqa: F401  # so that no plan's seconds count it

    for line in sys.stdin:
        try:
            print(json.dumps(planned(json.loads(line))), flush=True)
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(json.dumps({"failed": words}), flush=True)


if __name__ == "__main__":
    main()
