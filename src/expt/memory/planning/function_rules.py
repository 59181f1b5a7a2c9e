"""`FunctionRules`: what a call of torch's functions does on the target device.

One mode has all rules in a table, since a mode is asked about every call, attributes of tensors
included, and each further one takes as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

Rule = Callable[[Any, Any, Any], Any]
"""Makes a call: of a function, with arguments, and with arguments by name."""
BACKWARD = frozenset({Tensor.backward, torch.autograd.backward})


class FunctionRules(TorchFunctionMode):
    """Calls functions by their rules, and stays on in the backward pass.

    A mode is off while it handles a call; `loss.backward()` recomputes checkpointed blocks, which
    need the rules that are in force, hence it is handled with the mode on.

    Args:
        rules: by function.
        cuda: what the device `cuda` means, if something else.

    """

    def __init__(
        self, rules: Mapping[Callable[..., Any], Rule], cuda: torch.device | None = None
    ) -> None:
        super().__init__()
        self._rules, self._cuda = dict(rules), cuda

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what takes its place."""
        kwargs = kwargs or {}
        if self._cuda is not None:
            func, args, kwargs = _renamed(self._cuda, func, args, kwargs)
        rule = self._rules.get(func)
        if rule is not None:
            return rule(func, args, kwargs)
        if func in BACKWARD:
            with self:
                return backward(*args, **_by_one_name(kwargs))
        return func(*args, **kwargs)


def backward(
    tensors: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Run the backward pass as `torch.autograd.backward` does, with the modes on."""
    tensors = _several(tensors)
    given = _several(gradients) or (None,) * len(tensors)
    starts = tuple(
        torch.ones_like(tensor) if gradient is None and tensor.requires_grad else gradient
        for tensor, gradient in zip(tensors, given, strict=True)
    )
    _engine_run_backward(
        tensors, starts, create_graph if retain_graph is None else retain_graph, create_graph,
        _several(inputs), allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _by_one_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {"gradient": "gradients", "grad_tensors": "gradients"}
    return {names.get(key, key): value for key, value in kwargs.items()}


def _renamed(device: torch.device, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
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


def _names_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"
