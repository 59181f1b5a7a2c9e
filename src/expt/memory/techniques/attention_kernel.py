"""Which attention a model computes with, set from outside and while the model lives.

A module takes part by having an attribute `attention_kernel` that its `forward` reads, and, for
the kernels that need a size, `attention_window` and `attention_top_k`; `expt.jobs.attention`
does, and so may a module of one's own.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

AttentionKernel = Literal["math", "fused", "sliding_window", "top_k"]
ATTRIBUTES = ("attention_kernel", "attention_window", "attention_top_k")
BEFORE = "_attention_before"
"""Where a module keeps what it had before it was set."""


def set_attention_kernel(
    model: nn.Module,
    kernel: AttentionKernel | None,
    window: int | None = None,
    top_k: int | None = None,
) -> int:
    """Set the kernel in every module that has a choice; return how many have it now.

    `window` (tokens to either side) belongs to sliding_window, `top_k` (keys per query) to top_k.
    None gives every module back what it had at first.
    """
    modules = attention_modules(model)
    for module in modules:
        had: dict[str, Any] = getattr(module, BEFORE, None) or _settings(module)
        if kernel is None:
            wanted = had
            vars(module).pop(BEFORE, None)
        else:
            setattr(module, BEFORE, had)
            wanted = dict(zip(ATTRIBUTES, (kernel, window, top_k), strict=True))
        for name, value in wanted.items():
            if hasattr(module, name):
                setattr(module, name, value)
    return len(modules) if kernel is not None else 0


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have a choice of kernel."""
    return [module for module in model.modules() if hasattr(module, ATTRIBUTES[0])]


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ATTRIBUTES if hasattr(module, name)}
