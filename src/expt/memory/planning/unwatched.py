"""The formulas that torch takes when nobody watches, for functions whose derivative has two.

While a mode or a tensor subclass is present, torch differentiates `prod`, `cumprod` and the
largest, smallest and middle element without looking at values, by formulas that hold several
times as much (torch/csrc/autograd/FunctionsManual.cpp, `areAnyTensorSubclassLike`). `Unwatched`
gives them the derivative of an ordinary run, on an input without zeros. Other such places differ
only in working in place: see `expt.memory.measuring.in_place_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset({torch.prod, Tensor.prod})
RUNNING = frozenset({torch.cumprod, Tensor.cumprod})
ELEMENTS = frozenset(
    {torch.max, Tensor.max, torch.min, Tensor.min, torch.median, Tensor.median,
     torch.nanmedian, Tensor.nanmedian}
)  # fmt: skip

BACKWARD = frozenset({Tensor.backward, torch.autograd.backward})


class Unwatched(TorchFunctionMode):
    """Differentiates as torch does without a mode, and stays on in the backward pass.

    A mode is off while it handles a call; `loss.backward()` recomputes checkpointed blocks, which
    need the rules that are in force, hence it is handled with the mode on. It has to be the last
    that is entered.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self._elements = ELEMENTS if target == "cpu" else frozenset()  # CUDA has one formula

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what takes its place."""
        kwargs = kwargs or {}
        if func in PRODUCTS and _differentiable(args[0]):
            return _apply(_Product, args[0], args[1:], kwargs)
        if func in RUNNING and _differentiable(args[0]):
            return _apply(_RunningProduct, args[0], args[1:], kwargs)
        if func in self._elements and len(args) == 1 and not kwargs and _differentiable(args[0]):
            return _apply(_OneElement, args[0], func)
        if func in BACKWARD:
            with self:
                return backward(*args, **_renamed(kwargs))
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


def _differentiable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and torch.is_grad_enabled()
        and value.is_floating_point()
        and value.dim() > 0
    )


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {"gradient": "gradients", "grad_tensors": "gradients"}
    return {names.get(key, key): value for key, value in kwargs.items()}


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
