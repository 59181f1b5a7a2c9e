"""The memory techniques of a run as one value: what the plan predicts and the ladder changes.

A technique never changes what is computed, beyond rounding and the numbers that dropout draws,
except where its own documentation says so. No torch at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Checkpointing = bool | int | Literal["selective"]
"""False: none; True: every block; n >= 2: every n-th block; "selective": see `checkpointing`."""
AttentionKernel = Literal["math", "fused", "sliding_window", "top_k"]


@dataclass(frozen=True)
class Techniques:
    """Settings that decide a run's peak at a given model, batch and optimizer.

    Args:
        gradient_accumulation: micro-batches per optimizer step.
        activation_checkpointing: which blocks are computed again in the backward pass.
        attention_kernel: for models with `expt.models.attention.Attention`; None: theirs.
        saved_tensor_offload: keep what backward needs in host memory.
        optimizer_in_backward: step each parameter as its gradient is done.

    """

    gradient_accumulation: int = 1
    activation_checkpointing: Checkpointing = False
    attention_kernel: AttentionKernel | None = None
    saved_tensor_offload: bool = False
    optimizer_in_backward: bool = False
