"""Work that torch does in place, and out of place only because a dispatch mode watches.

While any `TorchDispatchMode` is on, `isTensorSubclassLike` (ATen/TensorSubclassLikeUtils.h) is true
for every tensor. torch then adds the bias of a linear layer, sums the gradients of a tensor that
was used twice, and scatters the gradient of `gather`, `index_select` or `sort` into a new tensor
instead of into the first operand: watched, a step may reach a higher peak than it does alone. A
mode that counts memory asks `InPlaceSums` about every operator, and enters the result of such a
sum in the place of its first operand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SUM = torch.ops.aten.add.Tensor
"""The operator that takes the place of the in-place form."""
aten = torch.ops.aten
ALIKE = frozenset(
    {SUM, aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_add.default,
     aten.put.default, aten.index_put.default}
)  # fmt: skip
"""Operators that torch's own code uses out of place only when it is watched."""
ALIKE_IN: dict[Any, str] = {
    aten.logical_and.default: "Clamp",
    aten.logical_or.default: "Clamp",
}
"""Those that are like this in the derivatives of some functions only, by the start of a node's
name."""
COUNTS_OWNERS = hasattr(Tensor, "_use_count")
Holders = tuple[int, int, int]
"""References to a tensor from Python, to it from C++, and to its storage."""


class InPlaceSums:
    """Tells such sums from the others: nothing but torch's own code holds the first operand."""

    def __init__(self) -> None:
        self._one_owner = _holders_of_one_owner()

    def has(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Judge an operator, in a mode's `__torch_dispatch__` and before the operator runs.

        Whether the result has the operand's size, as it must, is for the caller to see.
        """
        if func not in ALIKE and not _in_node(func):
            return False
        return _holders(args) in self._one_owner.get(func, self._one_owner[SUM])


def _in_node(func: Callable[..., Any]) -> bool:
    start = ALIKE_IN.get(func)
    if start is None:
        return False
    node = torch._C._current_autograd_node()
    return node is not None and node.name().startswith(start)


def _holders(args: tuple[Any, ...]) -> Holders:
    """Count who holds the first operand; no local variable may, here or in the callers."""
    if not isinstance(args[0], Tensor) or args[0].layout is not torch.strided:
        return (0, 0, 0)
    storage = torch._C._storage_Use_Count(args[0].untyped_storage()._cdata)
    owners = args[0]._use_count() if COUNTS_OWNERS else 0  # type: ignore[attr-defined]
    return (sys.getrefcount(args[0]), owners, storage)


class _Trial(TorchDispatchMode):
    """Collects the holders of the first operands of sums and of what is put at an index."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[Any, set[Holders]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (SUM, aten.index_put.default):
            self.found.setdefault(func, set()).add(_holders(args))
        return func(*args, **(kwargs or {}))


@cache
def _holders_of_one_owner() -> dict[Any, frozenset[Holders]]:
    """Return the counts of an operand that torch alone owns, by operator.

    A linear layer shows them for sums, and the derivative of an index for what it puts there. The
    counts differ between versions of Python and torch, hence the trial. An operand that a Python
    expression, an autograd node or a view holds as well has more.
    """
    tokens, weight, bias = torch.ones(2, 3, 4).transpose(0, 1), torch.ones(5, 4), torch.ones(5)
    rows = torch.ones(5, 4, requires_grad=True)
    with _Trial() as trial:
        with torch.no_grad():
            torch.nn.functional.linear(tokens, weight, bias)
        with torch.enable_grad():
            chosen = rows[torch.tensor([0, 1])]
            torch.autograd.grad(chosen, rows, torch.ones(2, 4))
    return {func: frozenset(holders) for func, holders in trial.found.items()}
