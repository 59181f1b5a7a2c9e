"""Activation checkpointing: keep a block's inputs, compute the rest again in the backward pass.

Works on any module without its cooperation: a block is an element of a `ModuleList` that holds
no further `ModuleList`, which is where repeated layers live. The random state is kept per block,
so that dropout draws the same numbers again (Chen et al., arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module) -> int:
    """Checkpoint every block of `model` in place; return how many there are."""
    blocks = repeated_blocks(model)
    for block in blocks:
        # On the instance: names and state_dict stay as they are.
        block.forward = _checkpointed(block.forward)
    return len(blocks)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the innermost elements of the model's `ModuleList`s, each once."""
    found = {
        id(block): block
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for block in parent
        if not any(isinstance(part, nn.ModuleList) for part in block.modules())
    }
    return list(found.values())


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
