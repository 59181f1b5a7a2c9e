"""The formulas that torch takes when nobody watches, for functions whose derivative has two.

While a mode or a tensor subclass is present, torch differentiates `prod`, `cumprod` and the
largest, smallest and middle element without looking at values, by formulas that hold several
times as much (torch/csrc/autograd/FunctionsManual.cpp, `areAnyTensorSubclassLike`). The rules
here give them the derivative of an ordinary run, on an input without zeros. Other such places
differ only in working in place: see `expt.memory.measuring.in_place_sums`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expt.memory.planning.function_rules import Rule

PRODUCTS: frozenset[Callable[..., Any]] = frozenset({torch.prod, Tensor.prod})
RUNNING: frozenset[Callable[..., Any]] = frozenset({torch.cumprod, Tensor.cumprod})
ELEMENTS: frozenset[Callable[..., Any]] = frozenset(
    {torch.max, Tensor.max, torch.min, Tensor.min, torch.median, Tensor.median,
     torch.nanmedian, Tensor.nanmedian}
)  # fmt: skip

NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input"}
"""NumPy's names of arguments, which torch takes too."""


def unwatched_rules(target: str) -> dict[Callable[..., Any], Rule]:
    """Return rules that differentiate as torch does without a mode."""
    rules: dict[Callable[..., Any], Rule] = {
        **dict.fromkeys(PRODUCTS, _product), **dict.fromkeys(RUNNING, _running_product)
    }  # fmt: skip
    if target == "cpu":  # CUDA has one formula
        rules |= dict.fromkeys(ELEMENTS, _one_element)
    return rules


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = _by_position(args, kwargs)
    if _differentiable(args[0]):
        return _apply(_Product, args[0], args[1:], kwargs)
    return func(*args, **kwargs)


def _running_product(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = _by_position(args, kwargs)
    if _differentiable(args[0]):
        return _apply(_RunningProduct, args[0], args[1:], kwargs)
    return func(*args, **kwargs)


def _one_element(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = _by_position(args, kwargs)
    if len(args) == 1 and not kwargs and _differentiable(args[0]):
        return _apply(_OneElement, args[0], func)
    return func(*args, **kwargs)


def _by_position(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call with its tensor first, and torch's own names for those that NumPy has."""
    named = {NAMES.get(name, name): value for name, value in kwargs.items()}
    if not args and "input" in named:
        args = (named.pop("input"),)
    return args, named


def _differentiable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and torch.is_grad_enabled()
        and value.is_floating_point()
        and value.dim() > 0
    )


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


class _Product(torch.autograd.Function):
    """`prod_backward`, where no factor is zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        result = torch.prod(tensor, *args, **kwargs)
        dim = args[0] if args else kwargs.get("dim")
        ctx.dim = dim if isinstance(dim, int) and not isinstance(dim, bool) else None
        ctx.keepdim = result.dim() == tensor.dim()
        ctx.save_for_backward(tensor, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        tensor, result = ctx.saved_tensors
        zeros = tensor == 0
        if ctx.dim is None:
            del zeros  # only their places are kept
        elif not ctx.keepdim:
            gradient, result = gradient.unsqueeze(ctx.dim), result.unsqueeze(ctx.dim)
        found = gradient * (result / tensor)
        return found, None, None


class _RunningProduct(torch.autograd.Function):
    """`cumprod_backward`, where no factor is zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        result = torch.cumprod(tensor, *args, **kwargs)
        ctx.dim = args[0] if args else kwargs["dim"]
        ctx.save_for_backward(tensor, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tensor, result = ctx.saved_tensors
        weighted = result * gradients[0]
        zeros = tensor == 0
        flipped = weighted.flip(ctx.dim)
        summed = flipped.cumsum(ctx.dim)
        sums = summed.flip(ctx.dim)
        del flipped, summed
        found = sums / tensor
        del zeros, weighted, sums
        return found, None, None


class _OneElement(torch.autograd.Function):
    """`evenly_distribute_backward` on the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, func: Any) -> Tensor:
        result: Tensor = func(tensor)
        ctx.save_for_backward(tensor, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tensor, result = ctx.saved_tensors
        mask = tensor == result
        found = torch.zeros_like(tensor)
        return found.masked_fill_(mask, gradients[0] / mask.sum()), None
