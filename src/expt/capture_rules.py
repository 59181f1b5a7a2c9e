"""Which training steps can be captured as a CUDA graph, and why others cannot.

A captured step is a fixed list of kernels on fixed addresses. Whatever the host decides or
computes in a step (a rate, a branch, a transfer) happens once, at the capture, and never again.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from expt.memory.recovery.one_by_one import bare_optimizer
from expt.memory.techniques.techniques import Techniques

CAPTURABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose fused kernel reads its rate, and its count of steps, from the device."""


def why_not_captured(
    optimizer: Optimizer,
    techniques: Techniques,
    scaler: object = None,
    processes: int = 1,
    compiled: bool = False,
) -> str | None:
    """Return why a step with these cannot be captured; None: nothing speaks against it.

    Args:
        optimizer: with or without Fabric's wrapper.
        techniques: those in force.
        scaler: fp16's, None without one.
        processes: that train together.
        compiled: the model runs as `torch.compile` makes it.

    """
    bare = bare_optimizer(optimizer)
    name = type(bare).__name__
    if processes > 1:
        return f"{processes} processes train together, which was not tried"
    if scaler is not None:
        return "fp16's scaler decides on the host whether to step; try memory.precision=bf16"
    if compiled and techniques.activation_checkpointing is not False:
        return "torch.compile repeats checkpointed blocks with random states of its own"
    if techniques.optimizer_in_backward:
        return "memory.optimizer_in_backward=true steps from hooks of the backward pass"
    if techniques.saved_tensor_offload:
        return "memory.saved_tensor_offload=true copies to host memory made in every step"
    if type(bare) not in CAPTURABLE or not all(group.get("fused") for group in bare.param_groups):
        return (
            f"{name} reads its learning rate on the host; torch's Adam, AdamW and SGD with "
            "fused=true do not (optimizer=adamw)"
        )
    if "step" in vars(bare):
        return f"{name}.step was replaced by another function"
    return None
