"""Code that names the device `cuda`, run where the plan is made: on the CPU, without a card.

Inside `cuda_names`, `device="cuda"`, `.cuda()` and `.to("cuda")` mean the CPU (while a model is
built: `meta`), `torch.autocast("cuda")` is the CPU's autocast, which `casting` gives CUDA's
rules, and waiting for the device does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

IDLE = ("synchronize", "set_device", "reset_peak_memory_stats", "reset_max_memory_allocated")
"""What `torch.cuda` does with a device that is not there."""


class CudaNames(TorchFunctionMode):
    """Puts another device in the place of `cuda` in every call."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` with the other device."""
        func, args, kwargs = renamed(self._device, func, args, kwargs or {})
        return func(*args, **kwargs)


def renamed(device: torch.device, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Return a call (function, arguments, arguments by name) with `device` instead of `cuda`."""
    if func is torch.device:  # a name alone is harmless
        return func, args, kwargs
    if func is Tensor.cuda:
        return Tensor.to, (args[0], device), {}
    if func is Tensor.pin_memory:
        return _itself, args[:1], {}
    for value in args:
        kind = type(value)
        if (issubclass(kind, str) or kind is torch.device) and _names_cuda(value):
            args = tuple(device if _names_cuda(value) else value for value in args)
            break
    if kwargs and _names_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": device}
    return func, args, kwargs


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def cuda_names(device: str = "cpu") -> Iterator[None]:
    """Let `cuda` mean `device` inside."""
    with cuda_idle(), CudaNames(device):
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


def _names_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


def _idle(name: str) -> Callable[..., None]:
    def nothing(*args: Any, **kwargs: Any) -> None:
        """Stand in for what waits for a device."""

    nothing.__name__ = name
    return nothing
