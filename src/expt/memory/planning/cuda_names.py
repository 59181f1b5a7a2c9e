"""Code that names the device `cuda`, run where the plan is made: on the CPU, without a card.

Inside `cuda_names`, `device="cuda"`, `.cuda()` and `.to("cuda")` mean the CPU (while a model is
built: `meta`), `torch.autocast("cuda")` is the CPU's autocast, which `casting` gives CUDA's
rules, and waiting for the device does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from expt.memory.planning.function_rules import FunctionRules

IDLE = ("synchronize", "set_device", "reset_peak_memory_stats", "reset_max_memory_allocated")
"""What `torch.cuda` does with a device that is not there."""


@contextmanager
def cuda_names(device: str = "cpu") -> Iterator[None]:
    """Let `cuda` mean `device` inside."""
    with cuda_idle(), FunctionRules({}, torch.device(device)):
        yield


@contextmanager
def cuda_idle() -> Iterator[None]:
    """Let autocast regions of `cuda` be the CPU's inside, and nothing wait for a device."""
    begin = torch.amp.autocast_mode.autocast.__init__

    def on_cpu(autocast: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(autocast, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    # One function each: torch's compiler, imported inside, tells them apart.
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.amp.autocast_mode.autocast, "__init__", on_cpu))
        for name in () if torch.cuda.is_available() else IDLE:
            stack.enter_context(patch.object(torch.cuda, name, _idle(name)))
        yield


def _idle(name: str) -> Callable[..., None]:
    def nothing(*args: Any, **kwargs: Any) -> None:
        """Stand in for what waits for a device."""

    nothing.__name__ = name
    return nothing
