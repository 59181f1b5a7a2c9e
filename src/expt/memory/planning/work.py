"""The arithmetic of a training step, counted without doing it.

Matrix products, convolutions and attention are counted by torch's own counter on fake tensors, what
checkpointing computes again included; what is done element by element is not. It tells ways to
compute the same step apart by time, as far as arithmetic decides it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from expt.memory.planning.fake import build_fake
from expt.memory.planning.hybrid import HybridFakeMode
from expt.memory.recovery.undo import RandomState


def count_flops(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    loss_fn: Callable[[Callable[..., Any], Any], Tensor],
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> int:
    """Return the floating-point operations of one forward and backward pass.

    A multiplication and an addition are two. The arguments are those of `expt.memory.plan`.

    Raises:
        Exception: what the given functions raise on fake tensors.

    """
    state = RandomState(torch.device("cpu"))
    fake, counter = HybridFakeMode(), FlopCounterMode(display=False)
    try:
        model = build_fake(model_fn, fake)
        prepare(model)
        # As products of matrices, which the counter knows on any device.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), fake, counter:
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            loss_fn(model, batch_fn()).backward()
    finally:
        fake.forget()
        state.restore()
    return int(counter.get_total_flops())
